"""Settings that are texts with parts, and what the checkpoint settings become."""

from __future__ import annotations

import contextlib
import math
import sys
from datetime import UTC, datetime

import pytest
from config_examples import changed, config, mapping
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.build import build_keep_policy, build_save_policy
from dino_exp.checkpoint.policies import BeforeDeadline, BestN, EveryNEpochs, LatestN, Milestones, Pinned
from dino_exp.config.canonical import config_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.stored import load_stored, write_stored
from dino_exp.config.texts import METRICS, MODES, read_best, read_moment
from dino_exp.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("val_loss:min:1", ("val_loss", "min", 1)),
        ("knn_1shot:max:2", ("knn_1shot", "max", 2)),
        ("knn_top1:max:999999999", ("knn_top1", "max", 999999999)),
    ],
)
def test_texts_of_a_further_best(text: str, read: tuple[str, str, int]) -> None:
    assert read_best(text) == read


@pytest.mark.parametrize(
    "text",
    [
        "", "val_loss", "val_loss:min", "val_loss:min:1:1", "val_los:min:1", "val_loss:minimum:1", "val_loss:min:0",
        "val_loss:min:-1", "val_loss:min:1.5", "val_loss:min:", "val_loss:min:²", "val_loss:min:1 ", " val_loss:min:1",
        "val_loss:min:1\n", "VAL_LOSS:min:1", "val_loss:min:9999999999",
    ],
)  # fmt: skip
def test_texts_of_no_best_name_what_there_is(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_best(text)
    assert all(word in str(caught.value) for word in (*METRICS, *MODES, repr(text)))


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-11-24T18:00:00+01:00", datetime(2026, 11, 24, 17, tzinfo=UTC)),
        ("2026-11-24T18:00:00Z", datetime(2026, 11, 24, 18, tzinfo=UTC)),
        ("2026-11-24 18:00-05:30", datetime(2026, 11, 24, 23, 30, tzinfo=UTC)),
        ("9999-12-31T23:59:59-14:00", None),
        ("0001-01-01T00:00:00+14:00", None),
    ],
)
def test_moments_with_a_zone(text: str, utc: datetime | None) -> None:
    found = read_moment(text)
    assert math.isfinite(found)
    assert utc is None or found == utc.timestamp()


@pytest.mark.parametrize("text", ["", "tomorrow", "18:00", "2026-11-24", "2026-11-24T18:00:00", "1800000000", "nan"])
def test_moments_of_no_zone_or_none_at_all(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a date and time with zone, such as 2026-11-24T18:00:00"):
        read_moment(text)


@given(st.one_of(st.text(), st.from_regex(r"[0-9:TWZ+. -]{0,30}", fullmatch=True)))
def test_no_text_is_more_than_a_configuration_error(text: str) -> None:
    for read in (read_best, read_moment):
        with contextlib.suppress(ConfigError):
            read(text)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"checkpoint__save__deadline": "tomorrow"}, "checkpoint.save.deadline: expected a date and time with zone"),
        ({"checkpoint__save__deadline": "2026-11-24T18:00:00"}, "which has no zone"),
        ({"checkpoint__save__before_secs": 0}, "checkpoint.save.before_secs: expected more than 0, got 0"),
        (
            {"checkpoint__save__deadline": "2026-11-24T18:00:00Z", "checkpoint__save__before_secs": None},
            "checkpoint.save.deadline is set and checkpoint.save.before_secs is null",
        ),
        ({"checkpoint__keep__every_epochs": 0}, "checkpoint.keep.every_epochs: expected at least 1, got 0"),
        ({"checkpoint__keep__also_best": "val_loss:min:1"}, "checkpoint.keep.also_best: expected a list of texts"),
        ({"checkpoint__keep__also_best": ["loss:min:1"]}, "a metric of knn_top1, knn5_top1, knn_10shot, knn_1shot, va"),
        ({"checkpoint__keep__also_best": ["loss:min:1"]}, "got 'loss:min:1'"),
        (
            {"checkpoint__keep__also_best": ["val_loss:min:1", "knn_top1:max:1", "val_loss:min:3"]},
            "checkpoint.keep.also_best: 'val_loss:min:1' and 'val_loss:min:3' rank alike: keep one of them",
        ),
    ],
)
def test_wrong_checkpoint_settings_are_refused_at_composition(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(changed(**values))
    assert expected in str(caught.value)


OVERRIDES = [
    "checkpoint.save.before_secs=30",
    "checkpoint.save.deadline=2026-11-24T18:00:00+01:00",
    "checkpoint.keep.also_best=[val_loss:min:1,knn_1shot:max:2]",
    "checkpoint.keep.every_epochs=3",
]


@pytest.mark.parametrize("override", OVERRIDES)
def test_what_to_save_and_keep_enters_no_hash(override: str) -> None:
    assert config_hash(config(override)) == config_hash(config())


def test_they_are_stored_with_a_run_and_read_back(tmp_path) -> None:
    made = config(*OVERRIDES)
    write_stored(made, tmp_path)
    assert load_stored(tmp_path).checkpoint == made.checkpoint


def test_a_run_stored_before_they_existed_still_reads() -> None:
    plain = mapping()
    for section, key in (
        ("save", "before_secs"),
        ("save", "deadline"),
        ("keep", "also_best"),
        ("keep", "every_epochs"),
    ):
        del plain["checkpoint"][section][key]
    found = config_from_mapping(plain).checkpoint
    assert (found.save.before_secs, found.save.deadline) == (None, None)
    assert (found.keep.also_best, found.keep.every_epochs) == ((), None)


@pytest.mark.parametrize(
    ("choice", "windows"),
    [("rotating", [120]), ("best", [120]), ("milestones", [120]), ("every_epoch", [120]), ("none", [])],
)
def test_every_choice_but_none_saves_before_the_end_of_an_allocation(choice: str, windows: list[float]) -> None:
    policies = build_save_policy(config(f"checkpoint={choice}").checkpoint).policies
    assert [policy.before_secs for policy in policies if isinstance(policy, BeforeDeadline)] == windows
    assert (choice == "none") == (not policies)


ALL = LatestN(sys.maxsize)


@pytest.mark.parametrize(
    ("overrides", "rules"),
    [
        ((), (LatestN(3), Pinned(), BestN("knn_top1", "max", 1), Milestones())),
        (
            ("checkpoint.keep.also_best=[val_loss:min:1,knn_1shot:max:2]",),
            (
                LatestN(3),
                Pinned(),
                BestN("knn_top1", "max", 1),
                BestN("val_loss", "min", 1),
                BestN("knn_1shot", "max", 2),
                Milestones(),
            ),
        ),
        (
            ("checkpoint.keep.best=0", "checkpoint.keep.also_best=[val_loss:min:1]"),
            (LatestN(3), Pinned(), BestN("knn_top1", "max", 0), BestN("val_loss", "min", 1), Milestones()),
        ),
        (
            ("checkpoint.keep.every_epochs=5", "checkpoint.keep.best=0"),
            (LatestN(3), Pinned(), EveryNEpochs(5), Milestones()),
        ),
        (("checkpoint=none", "checkpoint.keep.every_epochs=5"), (ALL, Pinned(), Milestones())),  # deletes nothing
    ],
)
def test_what_the_settings_keep(overrides: tuple[str, ...], rules: tuple[object, ...]) -> None:
    assert build_keep_policy(config(*overrides).checkpoint).rules == rules
