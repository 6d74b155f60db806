"""Which images lie below a folder: found by one walk, in an order and with a digest that any machine gives.

Shapes: N images, F folders.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dino_exp.errors import DataError, UsageError

SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp")
CONTENT_BYTES = 256 << 20
"""Up to so many bytes of images, what is in them is digested too; of more, their names and sizes."""

Progress = Callable[[str, int, int | None], None]
"""Hears of long work: what it is, how much of it is done, of how much (None: not known)."""

_TELL_EVERY = 2048
_MAGIC = b"dino_exp listing 1\n"


def unheard(_word: str, _done: int, _total: int | None) -> None:
    """A `Progress` where nobody looks."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The images below `root`, in the order of the bytes of their paths.

    One block of bytes for all paths, because a million objects would travel to every worker.
    """

    root: bytes
    paths: bytes  # relative to root, one after the other
    ends_N: NDArray[np.int64]  # where each ends in `paths`
    sizes_N: NDArray[np.int64]  # in bytes
    digest: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ends_N)

    def path(self, number: int) -> bytes:
        """The path of an image, relative to `root`."""
        start = self.ends_N[number - 1] if number else 0
        return self.paths[start : self.ends_N[number]]

    def full_path(self, number: int) -> bytes:
        """The path of an image."""
        return os.path.join(self.root, self.path(number))  # noqa: PTH118 (bytes: a name need not be text)

    def read(self, number: int) -> bytes:
        """All of an image's file. Raises DataError where it is not what was listed."""
        path = self.full_path(number)
        try:
            with open(path, "rb") as file:  # noqa: PTH123 (bytes)
                data = file.read(int(self.sizes_N[number]) + 1)  # not all of what it may have become
                size = max(len(data), os.fstat(file.fileno()).st_size)
        except OSError as problem:
            raise DataError(
                f"{shown(path)}: cannot be read ({problem.strerror}); it was there at the start"
            ) from problem
        if len(data) != self.sizes_N[number]:
            raise DataError(
                f"{shown(path)}: has {size} bytes, and had {self.sizes_N[number]} at the start: somebody changes "
                "the data set. Start again when that is over"
            )
        return data


def shown(path: bytes) -> str:
    """A path for messages, whatever bytes it is made of."""
    text = os.fsdecode(path)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def list_images(root: str, progress: Progress = unheard) -> Listing:
    """Walk the folders below `root`. Hidden files and folders are passed over; links to files are followed, those to
    folders are not.

    Raises UsageError where there is no such folder or no image in it, DataError for a link to nothing, OSError.
    """
    return _look(root, progress).listing


def current_listing(root: str, progress: Progress = unheard) -> Listing:
    """The same without walking again, where this process has walked and no folder has changed since.

    A command looks more than once. Where contents are digested no file may have changed either; of larger sets a file
    that is rewritten in place between two looks goes unnoticed here, and is noticed when it is read.
    """
    found = _last.get(root)
    if found is None or not found.is_current():
        _last.clear()  # one at a time: a listing takes memory
        found = _last[root] = _look(root, progress)
    return found.listing


@dataclass(frozen=True, eq=False)
class _Look:
    """A listing, and the times by which a later change shows."""

    listing: Listing
    folders: list[tuple[bytes, int]]  # time of change, ns
    changed_N: list[int] | None  # of the files, where what is in them counts

    def is_current(self) -> bool:
        try:
            if any(os.stat(path).st_mtime_ns != changed for path, changed in self.folders):  # noqa: PTH116
                return False
            files = [os.stat(self.listing.full_path(number)) for number in range(len(self.changed_N or ()))]  # noqa: PTH116
        except OSError:
            return False
        now = [(status.st_size, status.st_mtime_ns) for status in files]
        return self.changed_N is None or now == list(zip(self.listing.sizes_N.tolist(), self.changed_N, strict=True))


_last: dict[str, _Look] = {}


def _look(root: str, progress: Progress) -> _Look:
    top = os.fsencode(root)
    if not os.path.isdir(top):  # noqa: PTH112 (bytes)
        raise UsageError(f"{root}: there is no such folder")
    folders, found = _walk(top, progress)
    if not found:
        raise UsageError(
            f"{root}: holds no images; expected files that end in .jpg, .jpeg, .png or .webp, in it or in its folders"
        )
    found.sort()
    names = [name for name, _, _ in found]
    ends_N = np.cumsum([len(name) for name in names], dtype=np.int64)
    sizes_N = np.array([size for _, size, _ in found], np.int64)
    listing = Listing(top, b"".join(names), ends_N, sizes_N, "")
    digest = hashlib.sha256(_MAGIC)
    for part in (ends_N.astype("<i8").tobytes(), sizes_N.astype("<i8").tobytes(), listing.paths):
        digest.update(part)
    small = int(sizes_N.sum()) <= CONTENT_BYTES
    if small:
        for number in range(len(listing)):
            digest.update(listing.read(number))
            if number % _TELL_EVERY == 0:
                progress("reading images", number, len(listing))
    listing = Listing(top, listing.paths, ends_N, sizes_N, f"sha256:{digest.hexdigest()}")
    return _Look(listing, folders, [changed for _, _, changed in found] if small else None)


def _walk(top: bytes, progress: Progress) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int, int]]]:
    """Folders with their times of change, taken before looking; images with relative path, size and time of change."""
    folders: list[tuple[bytes, int]] = []
    found: list[tuple[bytes, int, int]] = []
    told, waiting = 0, [b""]
    while waiting:
        inner = waiting.pop()
        folder = os.path.join(top, inner)  # noqa: PTH118 (bytes)
        folders.append((folder, os.stat(folder).st_mtime_ns))  # noqa: PTH116
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(inner + name + b"/")
                elif name.lower().endswith(SUFFIXES):
                    if entry.is_file():
                        status = entry.stat()
                        found.append((inner + name, status.st_size, status.st_mtime_ns))
                    elif entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110
                        raise DataError(
                            f"{shown(entry.path)}: is a link to a file that is not there; bring that file back, or "
                            "remove the link"
                        )
        if len(found) - told >= _TELL_EVERY:
            told = len(found)
            progress("looking for images", told, None)
    return folders, found
