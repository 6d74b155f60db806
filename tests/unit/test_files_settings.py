"""Settings of images in files: what names a run, what cannot be, and what a resume or a fork makes of them."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from config_examples import config, mapping
from support.ensemble import each
from support.pictures import listing_of, small_tree
from torch.distributed import HashStore

from dino_exp.attempts import preparing
from dino_exp.attempts.data_files import apart_from_files, with_files, with_files_at, with_files_of_fork
from dino_exp.attempts.numerics import differences
from dino_exp.build import Preparation, decoding, preparation
from dino_exp.config.canonical import config_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.config.schema import Config
from dino_exp.config.stored import load_stored, write_stored
from dino_exp.data.files.listing import Progress
from dino_exp.dist.council import Council, OtherRankError
from dino_exp.dist.place import Place
from dino_exp.dist.ranks import ONE_RANK, ManyRanks
from dino_exp.errors import ConfigError

WORDS = ("data=folder", "augment=dino")


def on(root: Path, *words: str) -> Config:
    return config(*WORDS, f"data.root={root}", *words)


def data_of(made: Config) -> FilesDataConfig:
    assert isinstance(made.data, FilesDataConfig)
    return made.data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return small_tree(tmp_path / "images")


def test_the_digest_names_the_run_and_the_place_does_not(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_files(on(images))
    assert data_of(made).digest == listing_of(images).digest
    monkeypatch.chdir(images.parent)
    relative = with_files(on(Path("images"), "data.cache=true", "paths.cache=/elsewhere"))
    assert data_of(relative).root == str(images)
    assert config_hash(relative) == config_hash(made)
    hashes = {
        config_hash(with_files(on(images, word)))
        for word in ("data.decode_size=256", "data.labels=none", "data.val_share=0.2", "data.unreadable=skip")
    }
    assert len(hashes | {config_hash(made)}) == 5


def test_a_digest_is_not_typed(images: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.digest is found by looking through the folder"):
        with_files(on(images, f"data.digest=sha256:{'0' * 64}"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (WORDS, "data=folder needs the folder of its images: add data.root=<folder>"),
        (("data=imagenet", "augment=dino"), "data=imagenet needs the folder of its images"),
        (("data=folder", "data.root=x"), "augment=digits is made for grey digits and data=folder is in colour"),
        (("data.root=x",), "data.root=x and data=digits, which has no files: use data=folder, or leave it out"),
        (("data.cache=true",), "data.cache=true and data=digits, which needs no decoding: leave it out"),
        (("data=imagenet", "augment=dino", "data.root=x", "data.labels=none"), "data.labels=none with data=imagenet"),
        ((*WORDS, "data.root=x", "data.val_share=0"), "data.val_share: expected more than 0"),
        ((*WORDS, "data.root=x", "data.decode_size=8"), "data.decode_size: expected at least 16"),
    ],
)
def test_what_cannot_be_says_what_to_change(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*words)
    assert expected in str(caught.value)


def test_a_stored_run_remembers_where_its_images_lay(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "outputs/runs/run"
    run.mkdir(parents=True)
    made = with_files(on(images))
    write_stored(made, run)
    stored = load_stored(run)
    assert stored.data == made.data
    assert stored.paths.cache == str(tmp_path / "outputs/cache")


def test_a_resume_may_say_where_the_images_lie_beside_the_default_data(images: Path) -> None:
    composed = {**mapping("data.root=elsewhere"), "resume": "last"}
    plain, said = apart_from_files(composed, ["data.root", "train.epochs"])
    assert said == {"data.root": "elsewhere"}
    config_from_mapping(plain)
    run = with_files(on(images))
    moved = with_files_at(run, said)
    assert data_of(moved).root == str(Path("elsewhere").absolute())
    assert config_hash(moved) == config_hash(run)
    with pytest.raises(ConfigError, match=r"data\.root=elsewhere: the data of this run is data=digits"):
        with_files_at(config(), said)
    assert with_files_at(config(), {}) == config()


def test_a_new_run_keeps_what_it_says_to_be_checked() -> None:
    composed = mapping("data.root=elsewhere")
    assert apart_from_files(composed, ["data.root"]) == (composed, {})


def test_a_fork_looks_again_only_where_images_are_named(images: Path) -> None:
    parent = with_files(on(images))
    (images / "a/000.jpg").unlink()
    assert with_files_of_fork(parent, ["optimizer.lr"]) == parent
    again = with_files_of_fork(parent, ["data.root"])
    assert data_of(again).digest == listing_of(images).digest != data_of(parent).digest
    with pytest.raises(ConfigError, match="leave it out"):
        with_files_of_fork(parent, ["data.digest"])


def test_a_signal_ends_the_preparation_and_the_lock_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[int] = []
    signals = SimpleNamespace(stop_signal=None)
    attempt: Any = SimpleNamespace(
        config=config("paths.cache=/caches", "runtime.workers=3"), signals=signals, record=None,
        lock=SimpleNamespace(beat=lambda: beats.append(1)),
    )  # fmt: skip
    monkeypatch.setattr(preparing, "_BEAT_SECS", 0.0)
    with preparing.preparation(attempt, ONE_RANK) as how:
        assert (how.cache, how.workers, how.ranks, how.is_new) == (Path("/caches"), 3, ONE_RANK, True)
        how.progress("decoding images", 1, 2)
        assert beats == [1]
        signals.stop_signal = 15
        with pytest.raises(preparing.StoppedPreparingError) as stopped:
            how.progress("decoding images", 2, 2)
    assert stopped.value.exit_code == 143


def test_nobody_goes_on_before_all_ranks_have_prepared_however_long_one_takes(tmp_path: Path) -> None:
    """As on two hosts with disks of their own: each prepares for longer than others wait without a sign."""
    store, order = HashStore(), list[str]()
    ranks = [
        ManyRanks(place, Council(store, place, timeout_secs=0.8))
        for place in (Place(rank=at, size=3) for at in range(3))
    ]

    def work(at: int) -> int:
        def prepared(progress: Progress) -> int:
            order.append(f"{at} begins")
            for number in range(0 if at == 1 else 12):
                time.sleep(0.15)
                progress("decoding images", number, 12)
            order.append(f"{at} ends")
            return at

        how = Preparation(cache=tmp_path, ranks=ranks[at], progress=lambda word, *_: words[at].add(word))
        done = preparation.in_turn(how, prepared)
        order.append("all have")
        return done

    words: list[set[str]] = [set(), set(), set()]
    assert each([lambda at=at: work(at) for at in range(3)]) == [0, 1, 2]  # type: ignore[misc]
    assert order[:2] == ["0 begins", "0 ends"]
    assert order[-3:] == ["all have"] * 3
    assert words[0] == {"decoding images", "waiting for other processes that prepare the data"}


def test_a_rank_that_prepares_hears_its_signal_and_of_a_failure_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_exp.dist.council._SIGN_SECS", 0.0)
    store = HashStore()
    first, second = (
        ManyRanks(place, Council(store, place, timeout_secs=5)) for place in (Place(rank=at, size=2) for at in range(2))
    )
    flags: Any = SimpleNamespace(stop_signal=None)
    how = preparing.preparation_along(on(Path("images")), second, flags)
    how.progress("decoding images", 1, 2)
    second.council.give_sign()
    first.council.fail("no room", 1)
    with pytest.raises(OtherRankError, match="no room"):
        second.council.give_sign()
    flags.stop_signal = 10
    with pytest.raises(preparing.StoppedPreparingError):
        how.progress("decoding images", 2, 2)


def test_another_decoder_is_told_and_data_without_one_has_none(images: Path) -> None:
    now = decoding(on(images).data)
    assert "Pillow" in now["decoder"]
    assert differences(now, now) == []
    assert differences({"decoder": "1 (Pillow 1.0)"}, now) == [f"decoder was 1 (Pillow 1.0), is {now['decoder']}"]
    assert differences({}, now) == [f"decoder was not recorded, is {now['decoder']}"]
    assert decoding(config().data) == {}


def test_other_data_is_left_as_it_is() -> None:
    plain: Any = config()
    assert with_files(plain) is plain
    assert with_files_of_fork(plain, ["data.root"]) is plain
