"""The folder of the cache: whole files only, whoever else writes there, and whatever the disk says."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from support.pictures import encoded, listing_of, picture, small_tree, write

from dino_exp.data.files import crew, reading
from dino_exp.data.files import prepare as preparing
from dino_exp.data.files.listing import Listing
from dino_exp.data.files.placing import UnwrittenError, boot, placed, sweep
from dino_exp.data.files.prepare import Prepared, prepare
from dino_exp.data.files.unreadable import find_unreadable
from dino_exp.errors import ConfigError, DataError, RefusedError

GOOD = encoded(picture(0, 90, 90), "JPEG")
BAD = GOOD[:700]


def ready(listing: Listing, folder: Path, *, skip: bool = True, cache: bool = True) -> Prepared:
    return prepare(listing, side=24, skip=skip, cache=cache, folder=folder, num_workers=0)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*/*")}


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    root = small_tree(tmp_path / "images")
    write(root / "a/000.jpg", BAD)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fails(number: int) -> Any:
    def fail(path: object, *_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number), str(path))

    return fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_may_be_read_and_not_written_is_used(
    spoilt: Path, folder: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = listing_of(spoilt)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_open_lock", fails(number))
        for cache, what in ((True, "cache"), (False, "list of unreadable images")):
            with pytest.raises(RefusedError, match=rf"holds no {what} of these .* paths\.cache=<folder>"):
                ready(listing, folder, cache=cache)
    first = ready(listing, folder)
    before = state(folder)
    monkeypatch.setattr(preparing, "_open_lock", fails(number))
    again = ready(listing, folder)
    assert again.left_out == first.left_out == ready(listing, folder, cache=False).left_out
    assert again.canvases is not None
    assert len(first.left_out) == 1
    next(folder.glob("*/unreadable-24.json")).unlink()
    assert ready(listing, folder).left_out == first.left_out
    assert state(folder) == {name: when for name, when in before.items() if not name.startswith("unreadable")}


def test_a_folder_that_cannot_be_made_is_refused_too(
    spoilt: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "make_dirs", fails(errno.EACCES))
    with pytest.raises(RefusedError, match=r"cannot be written \(Permission denied\), and .* paths\.cache=<folder>"):
        ready(listing_of(spoilt), folder)


def test_a_file_where_the_folder_should_be_is_told(spoilt: Path, folder: Path) -> None:
    folder.write_bytes(b"")
    for place in (folder, folder / "below"):
        with pytest.raises(ConfigError, match=r"^paths\.cache=.*/cache is no folder\. Put it elsewhere: paths\.cache="):
            ready(listing_of(spoilt), place)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_is_told_with_a_way_out(
    spoilt: Path, folder: Path, cache: bool, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    listing = listing_of(spoilt)
    preparing.make_dirs(preparing._place_of(listing, folder))  # which syncs too
    with monkeypatch.context() as patch:
        patch.setattr(f"os.{call}", full)
        with pytest.raises(UnwrittenError) as caught:
            ready(listing, folder, cache=cache)
    name = "canvases-24.bin" if cache else "unreadable-24.json"
    assert f"/{name}: cannot be written (No space left on device). Put it elsewhere: paths.cache=" in str(caught.value)
    assert ("data.cache=false" in str(caught.value)) == cache
    assert [path.name for path in preparing._place_of(listing, folder).iterdir()] == ["lock"]


def test_a_disk_that_cannot_be_read_is_told(spoilt: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = listing_of(spoilt)
    ready(listing, folder)
    monkeypatch.setattr("os.preadv", fails(errno.EIO))
    for cache, name in ((True, "canvases-24.bin"), (False, "unreadable-24.json")):
        with pytest.raises(DataError, match=rf"/{name}: cannot be read \(Input/output error\)\. Put it elsewhere"):
            ready(listing, folder, cache=cache)


def test_two_that_write_one_name_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with placed(path, "") as one:
        one.write(b"half of ")
        with placed(path, "") as other:
            other.write(b"the other")
        assert path.read_bytes() == b"the other"
        one.write(b"the one")
    assert path.read_bytes() == b"half of the one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_others_raise_meanwhile_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), placed(tmp_path / "file", ""):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert list(tmp_path.iterdir()) == []


def test_only_what_nobody_writes_any_more_is_swept(tmp_path: Path) -> None:
    here, there = f".c.bin.{boot()}-7-0123abcd.tmp", ".c.bin.00000000-7-0123abcd.tmp"
    older, earlier = ".d.bin.00000000-7-0123abcd.tmp", ".c.bin.tmp"  # the last one by an earlier version
    for name in (here, there, older, earlier, "c.bin", ".hidden", "lock"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000, 1000) if name in (older, earlier, ".hidden") else (1700, 1700))
    sweep(tmp_path, now_secs=2000)
    assert {path.name for path in tmp_path.iterdir()} == {there, "c.bin", ".hidden", "lock"}


def test_a_lost_list_costs_the_unreadable_images_only(
    spoilt: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listing = listing_of(spoilt)
    first = ready(listing, folder)
    (path,), before = folder.glob("*/unreadable-24.json"), state(folder)
    text = path.read_text()
    path.unlink()
    decoded = []
    plain = reading.decode
    monkeypatch.setattr(reading, "decode", lambda data, side: (decoded.append(len(data)), plain(data, side))[1])
    assert ready(listing, folder).left_out == first.left_out
    assert decoded == [len(BAD)]
    assert path.read_text() == text
    assert state(folder)["canvases-24.bin"] == before["canvases-24.bin"]
    path.unlink()
    monkeypatch.setattr(reading, "decode", lambda data, side: plain(GOOD if data == BAD else data, side))
    assert ready(listing, folder).left_out == {}  # one that has been mended: of large sets nothing else tells
    assert "lacks images that can be decoded now; it is made again" in caplog.text


def test_want_of_processes_is_told(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(crew.multiprocessing, "Pipe", none_left)
    with pytest.raises(DataError, match=r"cannot be started \(Too many open files\); let fewer .*runtime\.workers=1"):
        find_unreadable(listing_of(spoilt), 24, 2, lambda *_: None)
