"""Owning a run for the moment that a command needs, without waiting for who owns it."""

from __future__ import annotations

import time

from dino_exp.errors import DinoExpError, LockedError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import RunLock, probe
from dino_exp.runs.record import load_record


def own(paths: RunPaths, doing: str) -> RunLock:
    """The run's lock. Raises LockedError that names the owner and says what was not done, RefusedError."""
    try:
        return RunLock.acquire(
            paths, wait_secs=0, attempt=_num_attempts(paths), clock=time.time, sleep=time.sleep, say=lambda _: None
        )
    except LockedError as error:
        raise LockedError(f"{paths.directory}: in use by {_owner(paths)}; {doing}") from error


def _owner(paths: RunPaths) -> str:
    try:
        owner = probe(paths, clock=time.time)
    except DinoExpError:
        owner = None
    return "another process, owner.json does not say which" if owner is None else owner.describe()


def _num_attempts(paths: RunPaths) -> int:
    """For `owner.json`: the attempt that this is no new one of. 0 where run.json does not say."""
    try:
        record = load_record(paths.run_json)
    except DinoExpError:
        return 0
    return 0 if record is None else len(record.attempts)
