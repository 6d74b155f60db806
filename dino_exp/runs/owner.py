"""`owner.json`: who holds the lock of a run, in a form that another host can judge."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from dino_exp.fsio import DamagedFileError, read_json_bounded, write_atomic
from dino_exp.processes import process_start_ticks, this_boot_id
from dino_exp.runs.jsontext import utc_text
from dino_exp.runs.shape import WrongShapeError, optional, real, record_of, text, whole

STALE_SECS = 60.0
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Owner:
    """One process that holds, or held, a run. Times are seconds since 1970.

    `process_started` is in clock ticks since boot, which tells a process from a later one of the same number.
    """

    host: str
    boot_id: str | None
    pid: int
    process_started: int | None
    token: str
    attempt: int
    started_at: float
    heartbeat_at: float

    def is_on_this_boot(self) -> bool:
        """Whether its POSIX locks and ours meet in one kernel, so that getting the lock proves it dead."""
        return (self.host, self.boot_id) == (socket.gethostname(), this_boot_id())

    def is_stale(self, now_secs: float) -> bool:
        """Whether it has not been heard of for STALE_SECS."""
        return now_secs - self.heartbeat_at > STALE_SECS

    def describe(self) -> str:
        """For messages: `host node7, pid 4711, since 2026-01-31T12:00:00.000000Z`."""
        return f"host {self.host}, pid {self.pid}, since {_when(self.started_at)}"


def this_owner(*, token: str, attempt: int, now_secs: float) -> Owner:
    """This process as an owner from now on."""
    pid = os.getpid()
    return Owner(
        host=socket.gethostname(), boot_id=this_boot_id(), pid=pid, process_started=process_start_ticks(pid),
        token=token, attempt=attempt, started_at=now_secs, heartbeat_at=now_secs,
    )  # fmt: skip


def load_owner(path: Path) -> Owner | None:
    """Read `owner.json`; None when there is none. Raises DamagedFileError."""
    try:
        return _OWNER(read_json_bounded(path, max_bytes=_MAX_BYTES, max_depth=2))
    except FileNotFoundError:
        return None
    except WrongShapeError as error:
        raise DamagedFileError(f"{path}: {error}; delete it when no process works on the run") from error


def save_owner(path: Path, owner: Owner, *, durable: bool) -> None:
    """Replace `owner.json`. Raises OSError."""
    write_atomic(path, json.dumps(asdict(owner), indent=2) + "\n", durable=durable)


def _when(secs: float) -> str:
    try:
        return utc_text(secs)
    except (OverflowError, ValueError, OSError):  # a damaged file may hold any number
        return "an unknown time"


_OWNER = record_of(
    Owner,
    {
        "host": text, "boot_id": optional(text), "pid": whole, "process_started": optional(whole),
        "token": text, "attempt": whole, "started_at": real, "heartbeat_at": real,
    },
)  # fmt: skip
