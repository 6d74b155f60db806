import contextlib
import json
import math
import os
from dataclasses import replace

import pytest
from runs_samples import CODE, KEY, sample_attempt, sample_record

from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.record import STATES, Best, RunRecord, load_record, save_record, shown_state

FULL = sample_record(
    data_fingerprint="digits:1:abc",
    parent={"run_key": KEY, "step": 3},
    run_key=f"{KEY}-v-1",
    variant="v-1",
    tags=("a", "ü"),
    note="weird \ud800 text",
    attempts=(
        sample_attempt(1, ended_at="2026-01-01T01:00:00Z", outcome="failed", error="disk full"),
        sample_attempt(2, resumed_from=20, exact=False, why_not_exact=("threads 2, was 1",)),
    ),
    numerics={"device": "cpu", "threads": 2, "deterministic": True},
    step=30,
    epochs_done=3,
    metrics={"loss": math.nan, "knn_top1": 0.93, "a": math.inf, "b": -math.inf, "tiny": 5e-324},
    best=Best(step=20, metric="knn_top1", value=0.95),
    trackers={"wandb": {"id": "x1"}},
)


def test_a_record_comes_back_as_it_was(tmp_path):
    path = tmp_path / "run.json"
    save_record(path, FULL)
    found = load_record(path)
    assert found is not None
    assert math.isnan(found.metrics["loss"])
    assert replace(found, metrics={}) == replace(FULL, metrics={})
    assert {**found.metrics, "loss": 0} == {**FULL.metrics, "loss": 0}
    assert json.loads(path.read_text())["metrics"]["loss"] == "nan"
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["format"] == 1


def test_no_file_is_no_record(tmp_path):
    assert load_record(tmp_path / "run.json") is None


def _saved(path, **members):
    """A file with other members and a digest that fits them, as a hostile writer would make it."""
    from dino_exp.runs import record as module

    save_record(path, FULL)
    value = json.loads(path.read_text()) | members
    value.pop("digest")
    path.write_text(json.dumps({**value, "digest": module._digest(value)}))


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"step": -1}, "step"),
        ({"step": True}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": 2**63}, "step"),
        ({"state": "sleeping"}, "state"),
        ({"config_hash": "c1:zz"}, "config_hash"),
        ({"run_key": "../../etc"}, "run_key"),
        ({"run_key": "vit_nano-00000000-cdcdcdcd-v-1"}, "run_key"),
        ({"attempts": {}}, "attempts"),
        ({"attempts": [{}]}, r"attempts\.0: no member"),
        ({"metrics": {"loss": "large"}}, r"metrics\.loss"),
        ({"metrics": {"loss": 10**400}}, r"metrics\.loss"),
        ({"tags": [1]}, r"tags\.0"),
        ({"best": {"step": 1, "metric": "loss", "value": None}}, r"best\.value"),
        ({"schedule": {"horizon_steps": 0, "steps_per_epoch": 1}}, "schedule"),
        ({"_target_": "os.system"}, "unknown member"),
        ({"code": {"id": "x", "commit": None, "dirty": None}}, "code"),
        ({"format": 0}, "format"),
        ({"format": "1"}, "format"),
    ],
)
def test_members_of_a_wrong_type_or_value_are_damage_that_says_where(tmp_path, members, said):
    path = tmp_path / "run.json"
    _saved(path, **members)
    with pytest.raises(DamagedFileError, match=said) as caught:
        load_record(path)
    assert "dino-exp checkpoints list" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": NaN}',
     b'{"format": 1, "format": 1}', b'{"a":' * 60 + b"1" + b"}" * 60,
     b'{"format": 1, "step": 1e999}', b'{"format": 1, "step": ' + b"9" * 5000 + b"}",
     b" " * (9 << 20)],
)  # fmt: skip
def test_hostile_or_torn_text_is_damage_and_no_traceback(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_bytes(text)
    with pytest.raises(DamagedFileError, match=r"run\.json"):
        load_record(path)


def test_a_link_or_a_folder_in_the_place_of_the_file_is_damage(tmp_path):
    save_record(tmp_path / "other.json", FULL)
    (tmp_path / "link").symlink_to(tmp_path / "other.json")
    (tmp_path / "folder").mkdir()
    for name in ("link", "folder"):
        with pytest.raises(DamagedFileError):
            load_record(tmp_path / name)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "run.json"
    record = replace(FULL, metrics={"loss": 1.25})
    save_record(path, record)
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for index, byte in enumerate(whole):
            os.pwrite(file.fileno(), bytes([byte ^ 1]), index)
            with contextlib.suppress(DamagedFileError, RefusedError):
                assert load_record(path) == record, f"byte {index} changed what was read"
            os.pwrite(file.fileno(), bytes([byte]), index)
    assert load_record(path) == record


def test_a_newer_format_is_refused_not_called_damaged(tmp_path):
    path = tmp_path / "run.json"
    _saved(path, format=2)
    with pytest.raises(RefusedError, match="format 2"):
        load_record(path)


def test_saving_replaces_and_leaves_nothing_else(tmp_path):
    for state in STATES:
        save_record(tmp_path / "run.json", sample_record(state=state))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert load_record(tmp_path / "run.json") == sample_record(state=STATES[-1])


@pytest.mark.parametrize("held", [True, False])
def test_running_is_shown_only_under_a_live_lock(held):
    assert shown_state(sample_record(state="running"), held) == ("running" if held else "interrupted")
    for state in STATES[1:]:
        assert shown_state(sample_record(state=state), held) == state


def test_a_new_attempt_closes_the_one_that_was_killed():
    record = sample_record().begin(sample_attempt(2))
    assert [attempt.outcome for attempt in record.attempts] == ["interrupted", None]
    ended = record.end("completed", ended_at="2026-01-01T02:00:00Z")
    assert (ended.state, ended.attempts[-1].outcome) == ("completed", "completed")
    assert ended.begin(sample_attempt(3)).attempts[1].outcome == "completed"


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": (sample_attempt(2),)}, {"variant": "v"}, {"state": "done"}, {"run_key": "x"}],
)
def test_a_record_cannot_be_born_wrong(wrong):
    with pytest.raises(ValueError, match=r"attempts|run_key|state"):
        sample_record(**wrong)


def test_an_attempt_is_exact_or_says_why_not():
    for wrong in ({"exact": False}, {"why_not_exact": ("threads",)}):
        with pytest.raises(ValueError, match="says why not"):
            sample_attempt(**wrong)
    assert isinstance(sample_record(code=CODE), RunRecord)
