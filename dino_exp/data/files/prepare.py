"""What is done once before a training on files: a check of all images, or a cache of them, kept for the next start."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dino_exp.data.files.cache import Canvases, Made, open_canvases
from dino_exp.data.files.cache_build import build_cache
from dino_exp.data.files.dataset import unreadable
from dino_exp.data.files.decode import decoder_name
from dino_exp.data.files.listing import Listing, Progress, shown, unheard
from dino_exp.data.files.placing import ELSEWHERE, UnwrittenError, sweep
from dino_exp.data.files.unreadable import find_unreadable, load_unreadable, save_unreadable
from dino_exp.errors import ConfigError, DataError, DinoExpError, RefusedError
from dino_exp.fsio import DamagedFileError, make_dirs

log = logging.getLogger("dino_exp")

NAMED = 10  # unreadable images that are named in the log
_FEW = 64  # images that are decoded sooner than a process starts
_POLL_SECS = 0.2
_NO_WRITING = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Prepared:
    """The images to leave out, with the reasons, and the cache, where one is wanted."""

    left_out: dict[int, str] = field(default_factory=dict)
    canvases: Canvases | None = None


def prepare(
    listing: Listing,
    *,
    side: int,
    skip: bool,
    cache: bool,
    folder: Path,
    num_workers: int,
    progress: Progress = unheard,
) -> Prepared:
    """Find what was prepared below `folder` (paths.cache), or do it now; of several processes one does, others wait.

    Raises DataError for the first image that cannot be decoded, where they are not to be skipped and a cache is made;
    ConfigError, RefusedError or UnwrittenError where `folder` is no place for it.
    """
    if not skip and not cache:
        return Prepared()
    place = _place_of(listing, folder)
    work = _Preparing(listing, side, place, num_workers if len(listing) > _FEW else 0, progress)
    try:
        make_dirs(place)
        lock = _open_lock(place / "lock")
    except OSError as problem:
        # Somebody else's, or on a disk that may only be read: it has all that is wanted, or it is the wrong place.
        found = work.found(skip, cache) if problem.errno in _NO_WRITING else None
        if found is None:
            raise _no_place(problem, folder, cache) from problem
        prepared = found
    else:
        with _held(lock, place, progress):
            found = work.found(skip, cache)
            prepared = work.make(skip, cache) if found is None else found
            if skip:
                work.remember(prepared.left_out)
    if prepared.left_out:
        named = [f"  {shown(listing.path(number))}: {why}" for number, why in list(prepared.left_out.items())[:NAMED]]
        more = len(prepared.left_out) - len(named)
        log.warning(
            "%d of %d images cannot be decoded and are left out (data.unreadable=skip); all of them: %s\n%s%s",
            len(prepared.left_out), len(listing), work.list_path, "\n".join(named),
            f"\n  and {more} more" if more else "",
        )  # fmt: skip
    return prepared


def prepared_so_far(listing: Listing, *, side: int, skip: bool, cache: bool, folder: Path) -> Prepared:
    """What `prepare` would find below `folder`, as far as it is there. Nothing is written, made or waited for."""
    found = _Preparing(listing, side, _place_of(listing, folder), 0, unheard)
    canvases = None
    if cache:
        with contextlib.suppress(OSError, DamagedFileError):
            canvases = open_canvases(found.cache_path, found.made)
    left_out = load_unreadable(found.list_path, listing, found.decoder) if skip else {}
    if canvases is not None and not skip and canvases.missing():
        canvases = None  # made where they were to be skipped: who reads such an image is told why it is not there
    if left_out is None:
        left_out = dict.fromkeys([] if canvases is None else canvases.missing(), "it could not be decoded")
    return Prepared(left_out, canvases)


def _place_of(listing: Listing, folder: Path) -> Path:
    return folder / listing.digest.partition(":")[2][:16]


class _Preparing:
    """What one listing needs, in its own folder of the cache, whose lock is held."""

    def __init__(self, listing: Listing, side: int, place: Path, num_workers: int, progress: Progress) -> None:
        self.listing, self.side, self.progress, self.num_workers = listing, side, progress, num_workers
        self.place, self.decoder = place, decoder_name()
        self.list_path = place / f"unreadable-{side}.json"
        self.cache_path = place / f"canvases-{side}.bin"
        self.made = Made(listing=listing.digest, num_images=len(listing), decode_size=side, decoder=self.decoder)

    @cached_property
    def remembered(self) -> dict[int, str] | None:
        """The list of unreadable images that is there."""
        with _readable(self.list_path):
            return load_unreadable(self.list_path, self.listing, self.decoder)

    def found(self, skip: bool, cache: bool) -> Prepared | None:
        """What is there, where it is all that is wanted. It writes nothing, and decodes but the images a cache lacks.

        Raises DataError for one of these, where they are not to be skipped.
        """
        if not cache:
            return None if self.remembered is None else Prepared(self.remembered)
        canvases = self._opened()
        if canvases is None:
            return None
        reasons = dict(self.remembered or {}) if skip else {}
        unknown = [number for number in canvases.missing() if number not in reasons][: None if skip else 1]
        num_workers = self.num_workers if len(unknown) > _FEW else 0
        why = find_unreadable(self.listing, self.side, num_workers, self.progress, unknown)
        if len(why) < len(unknown):
            log.warning("%s: lacks images that can be decoded now; it is made again", self.cache_path)
            return None
        if why and not skip:  # made where they were to be skipped
            raise unreadable(self.listing, *next(iter(why.items())))
        return Prepared(reasons | why, canvases)

    def make(self, skip: bool, cache: bool) -> Prepared:
        """What is wanted, made now; making a cache also finds what is unreadable."""
        sweep(self.place, time.time())
        if not cache:
            return Prepared(find_unreadable(self.listing, self.side, self.num_workers, self.progress))
        known = dict(self.remembered or {}) if skip else {}
        found = build_cache(
            self.cache_path, self.listing, self.made,
            known_bad=frozenset(known), may_skip=skip, num_workers=self.num_workers, progress=self.progress,
        )  # fmt: skip
        return Prepared(known | found, open_canvases(self.cache_path, self.made))

    def remember(self, reasons: dict[int, str]) -> None:
        """Keep the list for later starts, where it is not there already. Raises UnwrittenError."""
        if reasons != self.remembered:
            save_unreadable(self.list_path, self.listing, self.decoder, reasons)

    def _opened(self) -> Canvases | None:
        try:
            with _readable(self.cache_path):
                return open_canvases(self.cache_path, self.made)
        except DamagedFileError as damage:
            log.warning("%s; it is made again", damage)
        return None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Where there is no such file, leave the `with`. Raises DataError where it is there and cannot be read."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}). {ELSEWHERE}") from problem


def _no_place(problem: OSError, folder: Path, cache: bool) -> DinoExpError:
    """What to say where nothing can be prepared below `folder`, and what is there does not do."""
    what = "cache" if cache else "list of unreadable images"
    if problem.errno in (errno.EEXIST, errno.ENOTDIR):
        return ConfigError(f"paths.cache={folder}: {problem.filename} is no folder. {ELSEWHERE}")
    if problem.errno in _NO_WRITING:
        return RefusedError(
            f"{problem.filename}: cannot be written ({problem.strerror}), and {folder} holds no {what} of these images "
            f"that would do as it is. {ELSEWHERE}"
        )
    return UnwrittenError(f"{problem.filename}: cannot be written ({problem.strerror}). {ELSEWHERE}")


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


@contextlib.contextmanager
def _held(fd: int, place: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock on an open file, which is closed at the end; wait for another process that holds it.

    A POSIX lock: it ends with its process, whatever workers that leaves. Raises RefusedError where the file system has
    none.
    """
    started = time.monotonic()
    try:
        while not _try_lock(fd, place):
            progress("waiting for another process that prepares these images", int(time.monotonic() - started), None)
            time.sleep(_POLL_SECS)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int, place: Path) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise RefusedError(
            f"{place}: this file system cannot lock ({error.strerror}), expected POSIX locks. {ELSEWHERE}"
        ) from error
    return True
