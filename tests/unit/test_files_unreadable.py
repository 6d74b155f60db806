"""Images that cannot be decoded: refused at the first, or found beforehand and left out."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import encoded, listing_of, picture, small_tree, write

from dino_exp import build
from dino_exp.config.image_sections import FilesDataConfig
from dino_exp.data.files import reading
from dino_exp.data.files import unreadable as module
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.prepare import Prepared, prepare
from dino_exp.data.files.unreadable import find_unreadable, tasks_of
from dino_exp.data.loader import BatchStream
from dino_exp.errors import ConfigError, DataError

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


def test_a_file_too_large_for_memory_is_not_read(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(spoilt / "a/000.jpg", "wb") as file:  # noqa: PTH123
        file.truncate(2 * reading.MOST_BYTES)  # of which the disk holds nothing
    listing = listing_of(spoilt)
    monkeypatch.setattr("dino_exp.data.files.listing.Listing.read", lambda *_: JPEG)
    found = find_unreadable(listing, 32, 0, lambda *_: None)
    assert found == {0: "it has 1.1 GB, expected at most 537 MB: reduce it"}


def test_of_a_file_that_grows_no_more_is_read_than_was_listed(spoilt: Path) -> None:
    listing = listing_of(spoilt)
    with open(spoilt / "a/003.PNG", "wb") as file:  # noqa: PTH123
        file.truncate(1 << 29)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a/003\.PNG: has 536870912 bytes, and had"):
            listing.read(1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_want_of_memory_names_the_file(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, "decode", too_large)
    with pytest.raises(DataError, match=r"a/000\.jpg: there is no memory to read and decode it; lower runtime"):
        built(spoilt, spoilt).train.images(np.arange(1))


def test_tasks_are_smaller_where_images_are_larger() -> None:
    assert tasks_of(40, 512) == [range(16), range(16, 32), range(32, 40)]
    assert tasks_of(3, 2048) == [range(1), range(1, 2), range(2, 3)]
    assert tasks_of(3, 100_000) == tasks_of(3, 2048)


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
