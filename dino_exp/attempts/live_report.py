"""`report.html` beside the training: written in a process of its own, which takes only time that nobody else wants."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

log = logging.getLogger("dino_exp")

SWEEP_VARIABLE = "DINO_EXP_SWEEP"  # set for the jobs of a sweep: its name

_LOWEST_PRIORITY = 19
_LIVE = ("--no-model", "--most-mb", "200")  # what costs much is left to the last one
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class LiveReport:
    """Starts the process that writes the report, one at a time, and never waits for it while the training goes on.

    That it failed is said once. The page is derived: a training that is killed leaves the last one. `blocked_secs`:
    for how long the training was held up by all of it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._failure_told = False
        self.num_written = 0
        self.blocked_secs = 0.0

    def refresh(self) -> None:
        """There is something new. A report that is still being written is not disturbed: the next one will have it."""
        began = time.perf_counter()
        if self._process is None or self._process.poll() is not None:
            self._hear()
            self._start(_LIVE, gently=True)
        self.blocked_secs += time.perf_counter() - began

    def begin_last(self, *, hurried: bool) -> None:
        """Begin to write the last report, of a run that has ended, with all that it can have.

        `hurried`: the machine may be gone soon, or something is wrong, so what can be left out is.
        """
        self._stop()
        self._start(_LIVE if hurried else (), gently=False)

    def wait(self, secs: float) -> bool:
        """Wait for the last report; whether it was written."""
        if self._process is None:
            return False
        try:
            code = self._process.wait(secs)
        except subprocess.TimeoutExpired:
            self._stop()
            log.warning("report.html took longer than %.0f s and was left; %s", secs, self._again())
            return False
        self._hear()
        return code == 0

    def _start(self, options: Sequence[str], *, gently: bool) -> None:
        self.num_written += 1
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed when it is read)
        try:
            self._process = _begin(["checkpoints", "report", str(self._directory), *options], self._errors, gently)
        except OSError as problem:
            self._process = None
            self._tell(str(problem))

    def _hear(self) -> None:
        """How the last process ended."""
        if self._process is None or self._errors is None:
            return
        with self._errors as errors:
            errors.seek(0)
            lines = errors.read(1 << 16).decode("utf-8", "replace").strip().splitlines()
        self._errors = None
        if self._process.returncode:
            self._tell(lines[-1] if lines else f"exit code {self._process.returncode}")

    def _stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # it leaves the old page in place
            self._process.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _tell(self, problem: str) -> None:
        if not self._failure_told:
            log.warning("report.html could not be written: %s; training goes on. %s", problem, self._again())
        self._failure_told = True

    def _again(self) -> str:
        return f"To write it: dino-exp checkpoints report {shlex.quote(str(self._directory))}"


def begin_sweep_page(outputs: Path, *, gently: bool = True) -> subprocess.Popen[bytes] | None:
    """Begin to write the page of the sweep that this process works for; None where it works for none.

    Nobody waits for it: the next job writes it again.
    """
    name = os.environ.get(SWEEP_VARIABLE)
    if name is None:
        return None
    try:
        return _begin(["sweeps", "report", name, "--outputs", str(outputs)], subprocess.DEVNULL, gently)
    except OSError as problem:
        log.warning("the page of sweep %s could not be written: %s", name, problem)
        return None


def _begin(words: Sequence[str], errors: IO[bytes] | int, gently: bool) -> subprocess.Popen[bytes]:
    """Start `dino-exp <words>`. `gently`: it takes only what time nobody else wants."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dino_exp", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
        env={**os.environ, **(_ONE_THREAD if gently else {})},
        process_group=0,  # a terminal's Ctrl-C is the training's
    )  # fmt: skip
    if gently:
        with contextlib.suppress(OSError):  # it has come to its end already
            os.setpriority(os.PRIO_PROCESS, process.pid, _LOWEST_PRIORITY)
            if hasattr(os, "SCHED_IDLE"):  # on Linux: less than the lowest priority
                os.sched_setscheduler(process.pid, os.SCHED_IDLE, os.sched_param(0))
    return process
