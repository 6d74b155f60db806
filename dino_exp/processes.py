"""Processes: telling one from another, by its boot and its start, and running one that hears what this one is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_exp.errors import STOPPING

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
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


@dataclass(frozen=True)
class ChildEnd:
    """How a child of this process ended.

    `returned` is its exit code, minus the signal's number where one killed it; `signals` came to this process
    meanwhile.
    """

    returned: int
    signals: tuple[int, ...] = ()

    @property
    def stopped_by(self) -> int | None:
        """The signal that told this process to stop; USR1 only asks for a save."""
        return next((number for number in self.signals if number != signal.SIGUSR1), None)

    @property
    def code(self) -> int:
        """An exit code: 128+N where this process, or the child alone, was told to stop; 1 where it died otherwise."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        code = self.returned if self.returned >= 0 else 128 - self.returned
        return code if code <= 128 or code in STOPPING else 1


def run_child(command: Sequence[str]) -> ChildEnd:
    """Run a command to its end. A signal that comes to this process goes to it; this process waits for what it does.

    It leads a process group, so that a terminal's Ctrl-C reaches it once, through here. Raises OSError.
    """
    came: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: object) -> None:
        came.append(number)
        for process in child:
            process.send_signal(number)

    # Whoever ignores HUP (nohup) wants the child to live on, too.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON if number not in ignored}
    try:
        child.append(subprocess.Popen(command, process_group=0))
        for number in tuple(came):  # before the child was there to be told
            child[0].send_signal(number)
        return ChildEnd(child[0].wait(), tuple(came))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
