"""The cache of decoded images: the same pixels, whatever happened to the process that made it."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pictures import listing_of, small_tree, write

from dino_exp.data.files import prepare as preparing
from dino_exp.data.files.cache import ENTRY, Canvases, Made, open_canvases
from dino_exp.data.files.cache_build import build_cache, estimated_bytes
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.files.decode import decoder_name
from dino_exp.data.files.listing import Listing, unheard
from dino_exp.data.files.placing import UnwrittenError, boot
from dino_exp.data.files.prepare import Prepared, prepare
from dino_exp.errors import DataError
from dino_exp.fsio import LOCAL, DamagedFileError

SIDE = 24


def ready(listing: Listing, folder: Path, *, skip: bool = False, cache: bool = True, **more: Any) -> Prepared:
    return prepare(listing, side=SIDE, skip=skip, cache=cache, folder=folder, num_workers=0, **more)


def dataset(listing: Listing, canvases: Canvases | None) -> FilesDataset:
    ids = np.arange(len(listing))
    return FilesDataset(
        name="folder/train", listing=listing, ids_N=ids, labels_N=np.full(len(listing), -1), classes=(),
        decode_size=SIDE, canvases=canvases,
    )  # fmt: skip


def made_of(listing: Listing) -> Made:
    return Made(listing=listing.digest, num_images=len(listing), decode_size=SIDE, decoder=decoder_name())


def cache_file(folder: Path) -> Path:
    (path,) = folder.glob(f"*/canvases-{SIDE}.bin")
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/*"))


@pytest.fixture
def listing(tmp_path: Path) -> Listing:
    return listing_of(small_tree(tmp_path / "images"))


def test_pixels_are_those_that_decoding_gives(listing: Listing, tmp_path: Path) -> None:
    cached, plain = dataset(listing, ready(listing, tmp_path / "cache").canvases), dataset(listing, None)
    order = np.array([3, 0, 11, 3, 7])
    for one, other in ((cached, plain), (pickle.loads(pickle.dumps(cached)), plain)):  # noqa: S301 (our own)
        assert torch.equal(one.images(order).pixels_BCHW, other.images(order).pixels_BCHW)
        assert (one.images(order).sizes_B2 == other.images(order).sizes_B2).all()
        assert one.fingerprint() == other.fingerprint()
    assert len({tuple(size) for size in plain.images(np.arange(12)).sizes_B2.tolist()}) > 3


def test_it_is_made_once_and_read_without_the_images(listing: Listing, tmp_path: Path) -> None:
    ready(listing, tmp_path / "cache")
    before = cache_file(tmp_path / "cache").stat()
    for path in (tmp_path / "images").glob("*/*"):
        path.unlink()
    found = ready(listing, tmp_path / "cache").canvases
    assert found is not None
    assert cache_file(tmp_path / "cache").stat().st_ino == before.st_ino
    assert found.pixels(0).shape[0] == 3
    assert names(tmp_path / "cache") == [f"canvases-{SIDE}.bin", "lock"]


def test_processes_make_the_same_bytes(listing: Listing, tmp_path: Path) -> None:
    made = []
    for num_workers in (0, 2):
        path = tmp_path / f"{num_workers}.bin"
        build_cache(
            path, listing, made_of(listing), known_bad=frozenset(), may_skip=False, num_workers=num_workers,
            progress=unheard,
        )  # fmt: skip
        made.append(path.read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("place", [0, 20, 40, 400, "index"])
def test_a_damaged_head_or_index_is_noticed_and_the_cache_made_again(
    listing: Listing, tmp_path: Path, place: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = ready(listing, tmp_path / "cache")
    path, made = cache_file(tmp_path / "cache"), made_of(listing)
    at = len(made.head()) + ENTRY.itemsize + 3 if place == "index" else int(place)
    good = path.read_bytes()
    data = bytearray(good)
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError):
        open_canvases(path, made)
    again = ready(listing, tmp_path / "cache")
    assert "it is made again" in caplog.text
    assert path.read_bytes() == good
    assert again.canvases is not None
    assert whole.canvases is not None
    assert (again.canvases.index_N == whole.canvases.index_N).all()


def test_a_file_that_was_cut_off_is_noticed(listing: Listing, tmp_path: Path) -> None:
    ready(listing, tmp_path / "cache")
    path = cache_file(tmp_path / "cache")
    for length in (path.stat().st_size - 1, 300, 10, 0):
        os.truncate(path, length)
        with pytest.raises(DamagedFileError):
            open_canvases(path, made_of(listing))
    write(path, b"something else entirely, and longer than the magic word")
    with pytest.raises(DamagedFileError, match="it is no cache of images"):
        open_canvases(path, made_of(listing))


def test_another_version_of_the_decoder_makes_another_cache(
    listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ready(listing, tmp_path / "cache")
    monkeypatch.setattr(preparing, "decoder_name", lambda: "another")
    ready(listing, tmp_path / "cache")
    assert "it was made by or of something else" in caplog.text
    assert b'"decoder": "another"' in cache_file(tmp_path / "cache").read_bytes()


def test_damaged_pixels_are_noticed_when_they_are_read(listing: Listing, tmp_path: Path) -> None:
    found = ready(listing, tmp_path / "cache").canvases
    assert found is not None
    path, data = found.path, bytearray(found.path.read_bytes())
    data[int(found.index_N[5]["offset"]) + 7] ^= 4
    path.write_bytes(data)
    images = dataset(listing, open_canvases(path, made_of(listing)))
    images.images(np.array([4, 6]))
    with pytest.raises(DataError, match=r"the pixels of image 5 are damaged; remove this file"):
        images.images(np.array([5]))


def bad_disk(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_becomes_of_the_file_while_it_is_used_is_told(
    listing: Listing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, and in a worker that opens the file later."""
    found = ready(listing, tmp_path / "cache").canvases
    assert found is not None
    path, good, plain = found.path, found.path.read_bytes(), dataset(listing, None)
    there, elsewhere = dataset(listing, found), pickle.loads(pickle.dumps(dataset(listing, found)))  # noqa: S301
    one = np.array([5])
    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", bad_disk)
        with pytest.raises(DataError, match=r"image 5 cannot be read \(Input/output error\); remove this file"):
            there.images(one)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be opened now \(No such file or directory\)"):
        elsewhere.images(one)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "decoder_name", lambda: "another")
        ready(listing, tmp_path / "cache")
    with pytest.raises(DataError, match=r"another file than at the start"):
        elsewhere.images(one)
    write(path, good)  # another one of the same pixels, as two hosts may make
    assert torch.equal(elsewhere.images(one).pixels_BCHW, plain.images(one).pixels_BCHW)
    assert torch.equal(there.images(one).pixels_BCHW, plain.images(one).pixels_BCHW)  # still the one that was opened
    again = ready(listing, tmp_path / "cache").canvases
    os.truncate(path, int(found.index_N[5]["offset"]) + 1)
    with pytest.raises(DataError, match=r"the pixels of image 5 are damaged; remove this file"):
        dataset(listing, again).images(one)


class Crowded:
    """A file layer on a disk that is nearly full."""

    def __getattr__(self, name: str) -> Any:
        return getattr(LOCAL, name)

    def free_bytes(self, path: Path) -> int:
        assert path.is_dir()
        return 1000


def test_without_room_nothing_is_written(listing: Listing, tmp_path: Path) -> None:
    total = sum(pixels.size for pixels in (dataset(listing, None)._pixels(number) for number in range(len(listing))))
    assert estimated_bytes(listing, SIDE) == pytest.approx(total, abs=12)
    with pytest.raises(UnwrittenError, match=r"takes about .* kB, and 1.0 kB are free\. Put it elsewhere: paths"):
        build_cache(
            tmp_path / "c.bin", listing, made_of(listing), known_bad=frozenset(), may_skip=False, num_workers=0,
            progress=unheard, files=Crowded(),  # type: ignore[arg-type]
        )  # fmt: skip
    assert not list(tmp_path.glob("*c.bin*"))


class StopError(Exception):
    pass


def test_whoever_is_stopped_leaves_nothing_behind(listing: Listing, tmp_path: Path) -> None:
    def stop(word: str, done: int, total: int | None) -> None:
        assert (word, done, total) == ("decoding images", 12, 12)
        raise StopError

    with pytest.raises(StopError):
        ready(listing, tmp_path / "cache", progress=stop)
    assert names(tmp_path / "cache") == ["lock"]
    assert ready(listing, tmp_path / "cache").canvases is not None


BUILD = """
import os, signal, sys, time
from pathlib import Path
from dino_exp.data.files.listing import current_listing
from dino_exp.data.files.prepare import prepare
images, folder, what = sys.argv[1:]
words = []
def tell(word, done, total):
    if word not in words: words.append(word)
    if what == "dies" and done >= 64: os.kill(os.getpid(), signal.SIGKILL)
    if what == "slow" and done == 16:
        print("began", flush=True)
        time.sleep(1)
listing = current_listing(images)
prepare(listing, side=24, skip=False, cache=True, folder=Path(folder), num_workers=2 if what == "dies" else 0,
        progress=tell)
print("words", words)
"""


def start(images: Path, folder: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(images), str(folder), what], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_after_a_kill_it_is_made_again_and_what_was_left_is_swept(tmp_path: Path) -> None:
    images, folder = small_tree(tmp_path / "images", 100), tmp_path / "cache"
    with start(images, folder, "dies") as killed:
        assert killed.wait() == -signal.SIGKILL
    left, lock = names(folder)
    assert left.startswith(f".canvases-{SIDE}.bin.{boot()}-")
    assert lock == "lock"
    listing = listing_of(images)
    found = ready(listing, folder)
    assert names(folder) == [f"canvases-{SIDE}.bin", "lock"]
    every = np.arange(100)
    pixels = dataset(listing, found.canvases).images(every).pixels_BCHW
    assert torch.equal(pixels, dataset(listing, None).images(every).pixels_BCHW)


def test_of_two_at_once_one_makes_it_and_the_other_waits(tmp_path: Path) -> None:
    images, folder = small_tree(tmp_path / "images", 100), tmp_path / "cache"
    told: list[str] = []
    with start(images, folder, "slow") as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "began\n"
        started = time.monotonic()
        found = ready(listing_of(images), folder, progress=lambda word, *_: told.append(word))
        assert time.monotonic() - started > 0.4
        rest = other.stdout.read()
    assert other.returncode == 0
    assert "words ['decoding images']" in rest
    assert set(told) == {"waiting for another process that prepares these images"}
    assert found.canvases is not None
