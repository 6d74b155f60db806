"""What one process holds of images in files is bounded, whatever they are."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from support.pictures import encoded, listing_of, picture, small_tree, write

from dino_exp.data.files import reading
from dino_exp.data.files.reading import read_pixels
from dino_exp.data.files.unreadable import find_unreadable, tasks_of
from dino_exp.errors import DataError

JPEG = encoded(picture(0, 90, 90), "JPEG")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = small_tree(tmp_path / "images")
    write(root / "a/000.jpg", JPEG)
    return root


def test_a_file_too_large_for_memory_is_not_read(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(images / "a/000.jpg", "wb") as file:  # noqa: PTH123
        file.truncate(2 * reading.MOST_BYTES)  # of which the disk holds nothing
    listing = listing_of(images)
    monkeypatch.setattr("dino_exp.data.files.listing.Listing.read", lambda *_: JPEG)
    found = find_unreadable(listing, 32, 0, lambda *_: None)
    assert found == {0: "it has 1.1 GB, expected at most 537 MB: reduce it"}


def test_of_a_file_that_grows_no_more_is_read_than_was_listed(images: Path) -> None:
    listing = listing_of(images)
    with open(images / "a/003.PNG", "wb") as file:  # noqa: PTH123
        file.truncate(1 << 29)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a/003\.PNG: has 536870912 bytes, and had"):
            listing.read(1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_want_of_memory_names_the_file(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, "decode", too_large)
    with pytest.raises(DataError, match=r"a/000\.jpg: there is no memory to read and decode it; lower runtime"):
        read_pixels(listing_of(images), 0, 32)


def test_tasks_are_smaller_where_images_are_larger() -> None:
    assert tasks_of(40, 512) == [range(16), range(16, 32), range(32, 40)]
    assert tasks_of(3, 2048) == [range(1), range(1, 2), range(2, 3)]
    assert tasks_of(3, 100_000) == tasks_of(3, 2048)
