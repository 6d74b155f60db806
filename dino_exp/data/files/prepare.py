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
from pathlib import Path

from dino_exp.data.files.cache import Canvases, Made, open_canvases
from dino_exp.data.files.cache_build import build_cache
from dino_exp.data.files.dataset import unreadable
from dino_exp.data.files.decode import decoder_name
from dino_exp.data.files.listing import Listing, Progress, shown, unheard
from dino_exp.data.files.unreadable import find_unreadable, load_unreadable, save_unreadable
from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError, make_dirs

log = logging.getLogger("dino_exp")

NAMED = 10  # unreadable images that are named in the log
_FEW = 64  # images that are decoded sooner than a process starts
_POLL_SECS = 0.2


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

    Raises DataError for the first image that cannot be decoded, where they are not to be skipped and a cache is made.
    """
    if not skip and not cache:
        return Prepared()
    place = _place_of(listing, folder)
    make_dirs(place)
    num_workers = num_workers if len(listing) > _FEW else 0
    with locked(place / "lock", progress):
        found = _Preparing(listing, side, place, num_workers, progress)
        prepared = found.with_cache(skip) if cache else Prepared(found.check())
    if prepared.left_out:
        named = [f"  {shown(listing.path(number))}: {why}" for number, why in list(prepared.left_out.items())[:NAMED]]
        more = len(prepared.left_out) - len(named)
        log.warning(
            "%d of %d images cannot be decoded and are left out (data.unreadable=skip); all of them: %s\n%s%s",
            len(prepared.left_out), len(listing), found.list_path, "\n".join(named),
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
        self.decoder = decoder_name()
        self.list_path = place / f"unreadable-{side}.json"
        self.cache_path = place / f"canvases-{side}.bin"
        self.made = Made(listing=listing.digest, num_images=len(listing), decode_size=side, decoder=self.decoder)

    def check(self) -> dict[int, str]:
        """The unreadable images: remembered, or found now."""
        known = load_unreadable(self.list_path, self.listing, self.decoder)
        if known is None:
            known = find_unreadable(self.listing, self.side, self.num_workers, self.progress)
            save_unreadable(self.list_path, self.listing, self.decoder, known)
        return known

    def with_cache(self, skip: bool) -> Prepared:
        """The cache: the one that is there, or made now; making it also finds what is unreadable."""
        made = self.made
        remembered = load_unreadable(self.list_path, self.listing, self.decoder)
        reasons = dict(remembered or {})
        canvases = self._opened(made)
        if canvases is None or (skip and remembered is None and canvases.missing()):
            reasons |= build_cache(
                self.cache_path, self.listing, made,
                known_bad=frozenset(reasons if skip else ()),
                may_skip=skip, num_workers=self.num_workers, progress=self.progress,
            )  # fmt: skip
            canvases = open_canvases(self.cache_path, made)
        if not skip:
            for number in canvases.missing()[:1]:  # made where they were to be skipped
                raise unreadable(self.listing, number, reasons.get(number, "as data.unreadable=skip has found"))
            return Prepared({}, canvases)
        if remembered is None:
            save_unreadable(self.list_path, self.listing, self.decoder, reasons)
        return Prepared(reasons, canvases)

    def _opened(self, made: Made) -> Canvases | None:
        try:
            return open_canvases(self.cache_path, made)
        except FileNotFoundError:
            return None
        except DamagedFileError as damage:
            log.warning("%s; it is made again", damage)
            return None


@contextlib.contextmanager
def locked(path: Path, progress: Progress = unheard) -> Iterator[None]:
    """Hold the lock on a file, made if it is not there; wait for another process that holds it.

    A POSIX lock: it ends with its process, whatever workers that leaves. Raises RefusedError where the file system has
    none.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    started = time.monotonic()
    try:
        while not _try_lock(fd, path):
            progress("waiting for another process that prepares these images", int(time.monotonic() - started), None)
            time.sleep(_POLL_SECS)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int, path: Path) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise RefusedError(
            f"{path}: this file system cannot lock ({error.strerror}), expected POSIX locks; put the cache elsewhere: "
            "paths.cache=<folder>"
        ) from error
    return True
