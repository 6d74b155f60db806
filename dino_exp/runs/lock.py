"""One writer at a time: a POSIX lock, and `owner.json` for hosts whose locks do not meet ours."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any

from dino_exp.errors import LockedError
from dino_exp.fsio import LOCAL, DamagedFileError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.owner import STALE_SECS, Owner, load_owner, save_owner, this_owner
from dino_exp.runs.posix_lock import is_held_here, is_locked_elsewhere, try_lock, unlock

log = logging.getLogger(__name__)

_POLL_SECS = 0.5
_NUM_QUICK_TRIES = 2  # a reader's probe holds a shared lock for a moment, and is no owner
_QUICK_SECS = 0.05


class RunLock:
    """The right to write to one run directory. Got by `acquire`; a context manager that releases it."""

    def __init__(self, paths: RunPaths, fd: int, owner: Owner, clock: Callable[[], float]) -> None:
        self.owner = owner
        self._paths, self._fd, self._clock = paths, fd, clock
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls,
        paths: RunPaths,
        *,
        wait_secs: float,
        attempt: int,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        say: Callable[[str], None],
    ) -> RunLock:
        """Take the lock of an existing run directory.

        A dead owner of this boot is taken over at once. One on another host or boot is taken over when it has
        not been heard of for 60 s. Otherwise waits up to `wait_secs`, which `say` tells once, at once.
        Raises LockedError that names the owner; RefusedError where the folder cannot be written or locked.
        """
        patience = _Patience(paths, wait_secs, sleep, say)
        fd = _lock_file(paths, patience)
        try:
            _wait_for_other_host(paths, patience, clock)
            owner = this_owner(token=secrets.token_hex(16), attempt=attempt, now_secs=clock())
            save_owner(paths.owner, owner, durable=True)
        except BaseException:
            unlock(fd)
            raise
        return cls(paths, fd, owner, clock)

    def set_attempt(self, attempt: int) -> None:
        """Correct the number of the attempt, once `run.json` was read under the lock."""
        self._rewrite(attempt=attempt)

    def start_heartbeat(self, interval_secs: float = 15.0) -> None:
        """Begin to renew `owner.json` from a thread. Called after the loader workers have started."""
        assert self._thread is None, "one heartbeat is enough"
        self._thread = threading.Thread(target=self._beat, args=(interval_secs,), name="lock-heartbeat", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Show that this process lives, between long pieces of work before the heartbeat's thread.

        Raises LockedError when the run is another's now.
        """
        self.check()
        self._rewrite(heartbeat_at=self._clock())

    def check(self) -> None:
        """Return when this process is still the owner. Called before every commit.

        Raises LockedError when another took the run over while this one slept, or `owner.json` is gone;
        DamagedFileError when it cannot be read.
        """
        found = load_owner(self._paths.owner)
        if found is None or found.token != self.owner.token:
            who = found.describe() if found else "nobody now, owner.json is gone"
            raise LockedError(
                f"{self._paths.directory}: this process (pid {self.owner.pid}) lost the run while it was not "
                f"heard of; owner: {who}. Nothing was committed; "
                f"`dino-exp checkpoints list {shlex.quote(str(self._paths.directory))}` shows what is there"
            )

    def release(self) -> None:
        """Give the run back: the heartbeat stops, `owner.json` goes if it is ours. Twice is harmless."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self._stop.set()
        if os.getpid() == self.owner.pid:  # a forked child that leaves the `with` owns nothing
            if self._thread is not None:
                self._thread.join()
            with contextlib.suppress(OSError, DamagedFileError):
                if self._is_ours():
                    LOCAL.unlink(self._paths.owner)
        unlock(fd)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def _is_ours(self) -> bool:
        found = load_owner(self._paths.owner)
        return found is not None and found.token == self.owner.token

    def _rewrite(self, **changes: Any) -> None:
        with self._writing:
            self.owner = replace(self.owner, **changes)
            save_owner(self._paths.owner, self.owner, durable=False)  # a power loss ends the owner too

    def _beat(self, interval_secs: float) -> None:
        while not self._stop.wait(interval_secs):
            try:
                if not self._is_ours():
                    log.error("lost %s to another process; no commit follows", self._paths.directory)
                    return
                self._rewrite(heartbeat_at=self._clock())
            except (OSError, DamagedFileError) as error:  # a full disk passes; a lost run shows at the commit
                log.warning("heartbeat of %s not written: %s", self._paths.directory, error)


def probe(paths: RunPaths, *, clock: Callable[[], float]) -> Owner | None:
    """The live owner of a run, for readers; None when nobody works on it. Creates and changes nothing.

    Raises DamagedFileError when somebody holds the lock and `owner.json` cannot be read.
    """
    if is_held_here(paths.lock) or is_locked_elsewhere(paths.lock):
        return load_owner(paths.owner)
    owner = _owner_if_readable(paths)
    is_gone = owner is None or owner.is_on_this_boot() or owner.is_stale(clock())
    return None if is_gone else owner


class _Patience:
    """How long to wait for another owner, counted in what was slept: a clock that jumps is no matter."""

    def __init__(
        self, paths: RunPaths, wait_secs: float, sleep: Callable[[float], None], say: Callable[[str], None]
    ) -> None:
        self._paths, self._wait_secs, self._sleep, self._say = paths, wait_secs, sleep, say
        self.waited_secs, self._has_said = 0.0, False

    def wait(self, owner: Owner | None) -> None:
        """Sleep a little. Raises LockedError when the time is up."""
        who = owner.describe() if owner else "unknown, owner.json does not say"
        if self.waited_secs >= self._wait_secs:
            raise LockedError(
                f"{self._paths.directory}: another process works on this run: {who}; waited "
                f"{self.waited_secs:.0f} s. Stop it, or wait longer: `runtime.lock_wait_secs=<seconds>`"
            )
        if not self._has_said:
            self._has_said = True
            self._say(f"waiting up to {self._wait_secs:.0f} s for the run's owner: {who}")
        self._sleep(_POLL_SECS)
        self.waited_secs += _POLL_SECS

    def blink(self) -> None:
        """Sleep for less than anyone notices."""
        self._sleep(_QUICK_SECS)


def _lock_file(paths: RunPaths, patience: _Patience) -> int:
    """A descriptor of `lock` with the lock on it. Raises LockedError, RefusedError."""
    num_tries = 0
    while (fd := try_lock(paths.lock)) is None:
        if num_tries < _NUM_QUICK_TRIES:
            patience.blink()
        else:
            patience.wait(_owner_if_readable(paths))
        num_tries += 1
    return fd


def _wait_for_other_host(paths: RunPaths, patience: _Patience, clock: Callable[[], float]) -> None:
    """Wait, holding the lock, until the owner that the file names is surely gone.

    Gone: of this boot (it would hold the lock), or not heard of for STALE_SECS by its own clock, or silent
    for as long while we watched, which needs no clocks that agree.
    """
    watched_from, last_beat = patience.waited_secs, None
    while True:
        owner = _owner_if_readable(paths)
        if owner is None or owner.is_on_this_boot() or owner.is_stale(clock()):
            return
        if owner.heartbeat_at != last_beat:
            watched_from, last_beat = patience.waited_secs, owner.heartbeat_at
        elif patience.waited_secs - watched_from > STALE_SECS:
            return
        patience.wait(owner)


def _owner_if_readable(paths: RunPaths) -> Owner | None:
    try:
        return load_owner(paths.owner)
    except DamagedFileError as error:
        log.warning("ignoring a damaged owner.json: %s", error)
        return None
