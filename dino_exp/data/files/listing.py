"""Which images lie below a folder: found by one walk, in an order and with a digest that any machine gives.

Shapes: N images, F folders.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
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
_PART_MAGIC = b"dino_exp part of a listing 1\n"

# Pictures that this program makes, which are nobody's data set: those of a run (its trackers', say), which is known by
# a file that each has, and those of evaluations, known by their place. By no setting: other commands have others.
_OF_A_RUN = b"config.canonical.json"
_OF_AN_EVALUATION = re.compile(rb"(?:.*/)?evaluations/[^/]+/step-\d{9}/", re.DOTALL)


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

    def part(self, numbers_N: NDArray[np.int64]) -> Listing:
        """The images of these numbers, which ascend, as a listing of their own; this one where they are all."""
        if len(numbers_N) == len(self):
            return self
        names = [self.path(number) for number in numbers_N.tolist()]
        ends_N = np.cumsum([len(name) for name in names], dtype=np.int64)
        digest = hashlib.sha256(_PART_MAGIC + self.digest.encode() + numbers_N.astype("<i8").tobytes())
        return Listing(self.root, b"".join(names), ends_N, self.sizes_N[numbers_N], f"sha256:{digest.hexdigest()}")

    def read(self, number: int) -> bytes:
        """All of an image's file. Raises DataError where it is not what was listed."""
        path = self.full_path(number)
        try:
            # At once: a pipe that nobody writes to would keep one waiting for ever.
            with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise DataError(f"{shown(path)}: is no file any more; it was one at the start")
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


def name_of(path: bytes) -> str:
    """A path as text that goes into digests: of the same bytes the same, whatever locale and Python."""
    return path.decode("utf-8", "surrogateescape")


def current_listing(root: str, progress: Progress = unheard, *, root_key: str = "data.root") -> Listing:
    """The images below `root`, without walking again where this process has walked and no folder has changed since.

    Hidden files and folders are passed over, and pictures that this program has made; links to files are followed,
    those to folders are not. A command looks more than once. Where contents are digested no file may have changed
    either; of larger sets a file that is rewritten in place between two looks goes unnoticed here, and is noticed when
    it is read. Raises UsageError, which says to give another `root_key`, where there is no such folder or no image in
    it; DataError for what cannot be looked at.
    """
    found = _last.get(root)
    if found is None or not found.is_current():
        _last.clear()  # one at a time: a listing takes memory
        try:
            found = _last[root] = _look(root, progress)
        except UsageError as gone:
            raise UsageError(f"{gone}. Where the images lie now: {root_key}=<folder>") from gone
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
    _check_folder(root)
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


def _check_folder(root: str) -> None:
    try:
        mode = os.stat(root).st_mode  # noqa: PTH116
    except FileNotFoundError:
        raise UsageError(f"{root}: there is no such folder") from None
    except OSError as problem:
        raise UsageError(f"{root}: cannot be looked at ({problem.strerror})") from problem
    if not stat.S_ISDIR(mode):
        raise UsageError(f"{root}: is no folder; expected the folder that the images lie in")


def _walk(top: bytes, progress: Progress) -> tuple[list[tuple[bytes, int]], list[tuple[bytes, int, int]]]:
    """Folders with their times of change, taken before looking; images with relative path, size and time of change."""
    folders: list[tuple[bytes, int]] = []
    found: list[tuple[bytes, int, int]] = []
    told, waiting = 0, [b""]
    while waiting:
        inner = waiting.pop()
        path = os.path.join(top, inner)  # noqa: PTH118 (bytes)
        try:
            folders.append((path, os.stat(path).st_mtime_ns))  # noqa: PTH116
            with os.scandir(path) as entries:
                listed = list(entries)
            if inner and _is_own(inner, listed):
                continue
            for entry in listed:
                name, path = entry.name, entry.path
                if name.startswith(b"."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(inner + name + b"/")
                elif name.lower().endswith(SUFFIXES):
                    if entry.is_file():
                        status = entry.stat()
                        found.append((inner + name, status.st_size, status.st_mtime_ns))
                    elif entry.is_symlink() and not os.path.exists(path):  # noqa: PTH110
                        raise DataError(
                            f"{shown(path)}: is a link to a file that is not there; bring that file back, or remove "
                            "the link"
                        )
        except OSError as problem:
            raise _not_looked_at(path, problem) from problem
        if len(found) - told >= _TELL_EVERY:
            told = len(found)
            progress("looking for images", told, None)
    return folders, found


def _is_own(inner: bytes, listed: list[os.DirEntry[bytes]]) -> bool:
    """Whether a folder, by its path below the root and what is in it, holds what this program has written."""
    return _OF_AN_EVALUATION.fullmatch(inner) is not None or any(entry.name == _OF_A_RUN for entry in listed)


def _not_looked_at(path: bytes, problem: OSError) -> DataError:
    if os.path.islink(path):  # noqa: PTH114
        told = f"is a link that leads to no file ({problem.strerror}); mend it, or remove it"
    elif isinstance(problem, FileNotFoundError):
        told = "went away while it was looked at: somebody changes the data set. Start again when that is over"
    else:
        told = f"cannot be looked at ({problem.strerror}); make it readable, or take it out of the folder of the images"
    return DataError(f"{shown(path)}: {told}")
