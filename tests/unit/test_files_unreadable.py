"""Images that cannot be decoded: refused at the first, or found beforehand and left out."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import encoded, listing_of, picture, small_tree, write

from dino_exp import build
from dino_exp.build import files
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.files import unreadable as module
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.prepare import Prepared, prepare
from dino_exp.data.files.unreadable import find_unreadable
from dino_exp.data.loader import BatchStream
from dino_exp.errors import ConfigError, DataError, RefusedError

JPEG = encoded(picture(0, 90, 90), "JPEG")


def settings(root: Path, **changes: Any) -> FilesDataConfig:
    values: dict[str, Any] = {
        "name": "folder", "root": str(root), "cache": False, "download": False, "image_size": 16, "local_size": 8,
        "patch_size": 8, "digest": None, "decode_size": 32, "labels": "auto", "val_share": 0.3, "unreadable": "refuse",
    }  # fmt: skip
    return FilesDataConfig(**(values | changes))


def built(root: Path, folder: Path, **changes: Any) -> build.Data:
    return build.build_data(settings(root, **changes), build.Preparation(cache=folder))


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    root = small_tree(tmp_path / "images", 30)
    write(root / "a/000.jpg", JPEG[:700])
    write(root / "b/empty.jpg", b"")
    return root


def test_refusing_checks_nothing_and_names_the_file_when_it_is_met(spoilt: Path, tmp_path: Path) -> None:
    data = built(spoilt, tmp_path / "cache")
    assert len(data.train) + len(data.val) == 31
    assert not (tmp_path / "cache").exists()
    with (
        BatchStream(data.train, seed=0, batch_size=len(data.train)) as stream,
        pytest.raises(DataError) as caught,
    ):
        next(stream)
    told = str(caught.value)
    assert "data set folder/train: image " in told
    assert str(spoilt) in told
    assert "cannot be decoded: " in told
    assert "Repair or remove it, or leave out what cannot be decoded, with data.unreadable=skip" in told


def test_skipping_leaves_them_out_of_the_numbering(
    spoilt: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = built(spoilt, tmp_path / "cache", unreadable="skip")
    assert len(data.train) + len(data.val) == 29
    for part in (data.train, data.val):
        assert part.images(np.arange(len(part))).sizes_B2.min() > 0
        assert part.labels(np.arange(len(part))).unique().tolist() == [0, 1, 2]
    (path,) = (tmp_path / "cache").glob("*/unreadable-32.json")
    assert [entry["path"] for entry in json.loads(path.read_text())["unreadable"]] == ["a/000.jpg", "b/empty.jpg"]
    assert "2 of 31 images cannot be decoded and are left out (data.unreadable=skip)" in caplog.text
    assert "  b/empty.jpg: it is empty" in caplog.text


def test_the_next_start_reads_the_list_only(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = built(spoilt, tmp_path / "cache", unreadable="skip")
    monkeypatch.setattr(module, "find_unreadable", None)
    monkeypatch.setattr("dino_exp.data.files.prepare.find_unreadable", None)
    assert built(spoilt, tmp_path / "cache", unreadable="skip").train.fingerprint() == first.train.fingerprint()
    write(spoilt / "a/new.jpg", JPEG)
    with pytest.raises(TypeError):
        built(spoilt, tmp_path / "cache", unreadable="skip")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-5],
        lambda text: text.replace("a/000.jpg", "a/001.jpg"),
        lambda text: text.replace('"number": 0', '"number": -1'),
        lambda text: text.replace('"number": 0', '"number": 99'),
        lambda text: text.replace("sha256:", "sha256:0"),
        lambda text: text.replace('"unreadable": [', '"unreadable": 3, "x": ['),
    ],
)
def test_a_list_that_was_damaged_is_made_again(spoilt: Path, tmp_path: Path, damage: Any) -> None:
    listing = listing_of(spoilt)

    def left_out() -> Prepared:
        return prepare(listing, side=32, skip=True, cache=False, folder=tmp_path / "cache", num_workers=0)

    first = left_out()
    (path,) = (tmp_path / "cache").glob("*/unreadable-32.json")
    good = path.read_text()
    changed = damage(good)
    assert changed != good
    path.write_text(changed)
    assert left_out().left_out == first.left_out
    assert path.read_text() == good


def test_the_list_names_images_alike_whatever_the_locale_and_python(tmp_path: Path) -> None:
    root = small_tree(tmp_path / "images", 30)
    for name in (b"sp\xe9cial\xff.jpg", "zero\u200bwidth.jpg".encode()):
        write(Path(os.fsdecode(os.fsencode(root / "a") + b"/" + name)), b"")
    prepared = prepare(listing_of(root), side=32, skip=True, cache=False, folder=tmp_path / "cache", num_workers=0)
    assert len(prepared.left_out) == 2
    (path,) = (tmp_path / "cache").glob("*/unreadable-32.json")
    named = [entry["path"] for entry in json.loads(path.read_text())["unreadable"]]
    assert named == ["a/sp\udce9cial\udcff.jpg", "a/zero\u200bwidth.jpg"]


def test_processes_find_the_same(spoilt: Path) -> None:
    listing, told = listing_of(spoilt), list[int]()
    found = find_unreadable(listing, 32, 2, lambda word, done, total: told.append(done))
    assert found == find_unreadable(listing, 32, 0, lambda *_: None)
    assert list(found) == [0, 20]
    assert told == [16, 31]


def test_a_file_that_changes_meanwhile_is_no_unreadable_image(spoilt: Path) -> None:
    listing = listing_of(spoilt)
    write(spoilt / "a/003.PNG", b"changed")
    for num_workers in (0, 1):
        with pytest.raises(DataError, match=r"a/003\.PNG: has 7 bytes, and had"):
            find_unreadable(listing, 32, num_workers, lambda *_: None)


def test_what_lies_beside_the_parts_is_left_alone(tmp_path: Path) -> None:
    root, folder = tmp_path / "images", tmp_path / "cache"
    for part in ("train", "val"):
        small_tree(root / part)
    plain = built(root, folder)
    for name in ("a.jpg", "test/b.jpg", "zebra.jpg"):
        write(root / name, b"no image")
    beside = built(root, folder)
    cached = built(root, folder, cache=True)
    skipped = built(root, folder, unreadable="skip", cache=True)
    for part in ("train", "val"):
        one, other = getattr(plain, part), getattr(cached, part)
        assert other.fingerprint() == getattr(beside, part).fingerprint()
        assert other.canvases is not None
        assert skipped.train.left_out == ()
        every = np.arange(len(one))
        assert (one.images(every).pixels_BCHW == other.images(every).pixels_BCHW).all()
    write(root / "train/a/bad.jpg", b"no image")
    skipped = built(root, folder, unreadable="skip", cache=True)
    assert isinstance(skipped.train, FilesDataset)
    assert skipped.train.left_out == ("train/a/bad.jpg",)
    assert (skipped.train.images(np.arange(12)).pixels_BCHW == plain.train.images(np.arange(12)).pixels_BCHW).all()


def test_a_look_uses_a_cache_that_is_there_and_makes_none(spoilt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def looked(**changes: Any) -> FilesDataset:
        how = build.Preparation(cache=folder, looks_only=True)
        found = build.build_data(settings(spoilt, cache=True, **changes), how)
        to_make.append(build.cache_to_make(settings(spoilt, cache=True), found))
        assert isinstance(found.train, FilesDataset)
        return found.train

    to_make: list[int | None] = []
    assert looked().canvases is None
    assert not folder.exists()
    (expected,) = to_make
    whole = built(spoilt, folder, cache=True, unreadable="skip")
    assert isinstance(whole.train, FilesDataset)
    assert expected == pytest.approx(whole.train.canvases.path.stat().st_size, rel=0.2)  # type: ignore[union-attr]
    assert looked().canvases is None  # unreadable=refuse: the reader is told of the file
    (names,) = folder.glob("*/unreadable-32.json")
    for kept in (True, False):
        found = looked(unreadable="skip")
        assert found.canvases is not None
        assert found.fingerprint() == whole.train.fingerprint()
        assert to_make[-1] is None
        assert names.exists() is kept
        names.unlink(missing_ok=True)


@pytest.mark.parametrize(("asked", "expected"), [(0, 5), (1, 1), (7, 7)])
def test_so_many_processes_prepare_as_are_asked_for(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int, expected: int
) -> None:
    counts: list[int] = []
    monkeypatch.setattr(files.os, "sched_getaffinity", lambda _: range(5))
    monkeypatch.setattr(files, "prepare", lambda *_, num_workers, **__: counts.append(num_workers) or Prepared())
    build.build_data(settings(spoilt), build.Preparation(cache=tmp_path, workers=asked))
    assert counts == [expected]


def test_a_new_run_is_refused_other_images_than_name_it(spoilt: Path, tmp_path: Path) -> None:
    digest = listing_of(spoilt).digest
    how = build.Preparation(cache=tmp_path / "cache", is_new=True)
    build.build_data(settings(spoilt, digest=digest), how)
    write(spoilt / "a/new.jpg", JPEG)
    with pytest.raises(RefusedError, match=r"they have changed meanwhile\. Type the command again .* data\.root="):
        build.build_data(settings(spoilt, digest=digest), how)
    build.build_data(settings(spoilt, digest=digest), replace(how, is_new=False))  # compared with the record later


def test_names_of_classes_are_digested_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_tree(tmp_path / "images")
    (root / "a").rename(root / "é")
    first = built(root, tmp_path / "cache").train
    monkeypatch.setattr(os, "fsdecode", lambda path: os.fspath(path).decode("ascii", "surrogateescape"))
    second = built(root, tmp_path / "cache").train
    assert isinstance(first, FilesDataset)
    assert first.classes == ("b", "c", "é")
    assert second.fingerprint() == first.fingerprint()


@pytest.mark.parametrize("first", ["cache", "list"])
def test_the_cache_and_the_list_leave_out_the_same(spoilt: Path, tmp_path: Path, first: str) -> None:
    folders = tmp_path / "one", tmp_path / "two"
    plain = built(spoilt, folders[0], unreadable="skip")
    if first == "list":
        built(spoilt, folders[1], unreadable="skip")
    cached = built(spoilt, folders[1], unreadable="skip", cache=True)
    again = built(spoilt, folders[1], unreadable="skip", cache=True)
    assert isinstance(cached.train, FilesDataset)
    assert cached.train.canvases is not None
    with pytest.raises(DataError, match="the pixels of image 0 are damaged"):
        cached.train.canvases.pixels(0)
    for one in (cached, again):
        for part, other in ((one.train, plain.train), (one.val, plain.val)):
            assert part.fingerprint() == other.fingerprint()
            every = np.arange(len(part))
            assert (part.images(every).pixels_BCHW == other.images(every).pixels_BCHW).all()
    lists = [next(folder.glob("*/unreadable-32.json")).read_text() for folder in folders]
    assert lists[0] == lists[1]


def test_refusing_stops_at_the_making_of_a_cache_and_at_one_that_lacks_images(spoilt: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(DataError, match=r"a/000\.jpg: cannot be decoded: .* data\.unreadable=skip"):
        built(spoilt, folder, cache=True)
    assert not list(folder.glob("*/*.bin"))
    built(spoilt, folder, cache=True, unreadable="skip")
    with pytest.raises(DataError, match=r"a/000\.jpg: cannot be decoded: .* data\.unreadable=skip"):
        built(spoilt, folder, cache=True)


def test_left_out_images_change_the_fingerprint(spoilt: Path, tmp_path: Path) -> None:
    skipped = built(spoilt, tmp_path / "cache", unreadable="skip")
    assert skipped.train.fingerprint() != built(spoilt, tmp_path / "cache").train.fingerprint()


def test_nothing_readable_is_told(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"images/{number}.jpg", b"no")
    with pytest.raises(ConfigError, match=r"none of the \d images of train can be decoded"):
        built(tmp_path / "images", tmp_path / "cache", unreadable="skip")
