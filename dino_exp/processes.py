"""Telling one process from another: the boot that it belongs to, and when it began."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_boot_id() -> str | None:
    """The kernel's identity of this boot; None where there is no such file."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return None


def process_start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22); None where nothing tells."""
    fields = _status(pid)
    return None if fields is None else int(fields[19])


def _status(pid: int) -> list[str] | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return status.rpartition(")")[2].split()  # the name before the bracket may hold spaces and brackets


@dataclass(frozen=True)
class ProcessId:
    """One process of one boot of one host."""

    host: str
    boot_id: str | None
    pid: int
    started: int | None

    @classmethod
    def of_this(cls) -> ProcessId:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), this_boot_id(), pid, process_start_ticks(pid))

    def is_surely_gone(self) -> bool:
        """Whether it has ended, as far as this host can tell; of a process elsewhere nothing is known."""
        if self.boot_id is None or (self.host, self.boot_id) != (socket.gethostname(), this_boot_id()):
            return False
        fields = _status(self.pid)
        return fields is None or fields[0] in ("Z", "X") or int(fields[19]) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"
