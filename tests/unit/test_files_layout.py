"""Which images are held out, and which classes there are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.pictures import listing_of, write

from dino_exp.data.files.layout import Parts, divide, is_held_out
from dino_exp.errors import ConfigError


def parts_of(root: Path, *names: str, labels: str = "auto", val_share: float = 0.5, needs_both: bool = False) -> Parts:
    for name in names:
        write(root / f"{name}.jpg", b"x")
    return divide(listing_of(root), labels=labels, val_share=val_share, needs_both=needs_both)


MANY = [f"{letter}/{number}" for letter in "abc" for number in range(40)]


def test_folders_of_the_first_level_are_classes(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, *MANY, "b/deep/er/1")
    assert parts.classes == ("a", "b", "c")
    listing = listing_of(tmp_path)
    for ids, labels in ((parts.train_N, parts.train_labels_N), (parts.val_N, parts.val_labels_N)):
        assert [listing.path(int(one))[:1].decode() for one in ids] == ["abc"[int(label)] for label in labels]
    assert sorted([*parts.train_N, *parts.val_N]) == list(range(121))


@pytest.mark.parametrize("names", [["1", "2", "3", "4"], [*MANY, "loose"], [f"a/{number}" for number in range(40)]])
def test_auto_finds_no_classes_where_not_every_image_has_one_of_two(tmp_path: Path, names: list[str]) -> None:
    parts = parts_of(tmp_path, *names)
    assert parts.classes == ()
    assert set(parts.train_labels_N) | set(parts.val_labels_N) == {-1}


def test_classes_can_be_left_alone_and_demanded(tmp_path: Path) -> None:
    assert parts_of(tmp_path, *MANY, labels="none").classes == ()
    with pytest.raises(ConfigError, match=r"1 images lie in no folder of a class, for example loose\.jpg"):
        parts_of(tmp_path, "loose", labels="folders")
    with pytest.raises(ConfigError, match=r"lie in the one folder a;"):
        parts_of(tmp_path / "a-only", *(f"a/{number}" for number in range(20)), labels="folders")


def test_more_images_move_none_between_the_parts(tmp_path: Path) -> None:
    names = [f"{number}" for number in range(200)]
    before = parts_of(tmp_path, *names, val_share=0.2)
    old = listing_of(tmp_path)
    held = {old.path(int(one)) for one in before.val_N}
    assert 20 < len(held) < 60
    after = parts_of(tmp_path, *(f"new/{number}" for number in range(200)), val_share=0.2)
    listing = listing_of(tmp_path)
    now = {listing.path(int(one)) for one in after.val_N}
    assert {path for path in now if not path.startswith(b"new/")} == held
    assert all(is_held_out(path, 0.5) for path in held)  # a larger share holds out more, and the same ones


def test_train_and_val_folders_are_taken_as_they_are_and_the_rest_is_left(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, "train/a/1", "train/b/2", "val/a/3", "test/a/4", "5")
    listing = listing_of(tmp_path)
    assert [listing.path(int(one)) for one in parts.train_N] == [b"train/a/1.jpg", b"train/b/2.jpg"]
    assert [listing.path(int(one)) for one in parts.val_N] == [b"val/a/3.jpg"]
    assert (parts.classes, parts.train_labels_N.tolist(), parts.val_labels_N.tolist()) == (("a", "b"), [0, 1], [0])


def test_one_of_them_alone_is_a_folder_like_others(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, *(f"train/{name}" for name in MANY))
    assert len(parts.train_N) + len(parts.val_N) == len(MANY)
    assert parts.classes == ()


def test_a_part_must_not_be_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of 1 images data\.val_share=0\.5 leaves . to train on and holds . out"):
        parts_of(tmp_path, "1")


def test_imagenet_needs_both_parts_with_the_same_classes(tmp_path: Path) -> None:
    good = ["train/a/1", "train/b/2", "val/a/3", "val/b/4"]
    assert parts_of(tmp_path / "good", *good, needs_both=True).classes == ("a", "b")
    for name, names, expected in (
        ("no val", good[:2], "holds 2 images below train/ and 0 below val/"),
        ("flat", [*good, "val/5"], "images lie in val/ itself"),
        ("loose", [*good, "train/5"], "images lie in train/ itself"),
        ("differ", [*good, "train/c/5", "val/d/6"], "they differ: c only in train/, d only in val/"),
        ("one", ["train/a/1", "val/a/2"], "have one class only"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parts_of(tmp_path / name, *names, needs_both=True)


def test_the_hash_is_the_same_everywhere() -> None:
    paths = [f"{number}.jpg".encode() for number in range(8)]
    assert [is_held_out(path, 0.5) for path in paths] == [True, True, True, False, True, False, True, False]
    shares = [np.mean([is_held_out(b"%d" % number, share) for number in range(4000)]) for share in (0.1, 0.5, 0.9)]
    assert shares == pytest.approx([0.1, 0.5, 0.9], abs=0.03)
