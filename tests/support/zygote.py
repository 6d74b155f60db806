"""Real trainings without the wait for imports: one process imports everything, and forks for each attempt.

An attempt is a process of its own, of a session of its own, that runs the entry point, and can be killed like any
other.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Attempt:
    """One attempt that was started; its session has the number of its process."""

    server: Zygote
    pid: int
    log: Path
    code: int | None = None

    def ends_within(self, secs: float) -> bool:
        """Wait for its end, for `secs` at most; whether it came."""
        return self.code is not None or self.server.has_answer(secs)

    def wait(self) -> int:
        """Its exit code; minus the signal's number when a signal killed it."""
        if self.code is None:
            self.code = int(self.server.read())
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def output(self) -> str:
        """What it has printed, on both streams."""
        return self.log.read_text()


class Zygote:
    """Forks attempts on demand, one at a time. `read_at_start` is for whoever wants to know whether it will do."""

    def __init__(self, environment: Mapping[str, str], read_at_start: Mapping[str, str]) -> None:
        self.read_at_start = read_at_start
        self._folder = tempfile.TemporaryDirectory(prefix="attempts-")
        self._num_started = 0
        self._last: Attempt | None = None
        places = [environment.get("PYTHONPATH", ""), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], text=True, bufsize=1, cwd=self._folder.name,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, places))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.read() == "ready"

    def start(self, arguments: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Attempt:
        """Begin an attempt in a directory. One that a failed test has left running is killed first."""
        if self._last is not None and self._last.code is None:
            with contextlib.suppress(ProcessLookupError):  # it may have come to its end, unasked
                os.killpg(self._last.pid, signal.SIGKILL)
            self._last.wait()
        log = Path(self._folder.name) / f"{self._num_started}.txt"
        self._num_started += 1
        order = {
            "arguments": list(arguments), "directory": str(directory), "environment": dict(environment),
            "log": str(log),
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._last = Attempt(self, int(self.read()), log)
        return self._last

    def has_answer(self, secs: float) -> bool:
        return bool(select.select([self._process.stdout], [], [], secs)[0])

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the zygote has died"
        return line

    def close(self) -> None:
        with self._process:  # closes its pipes, whereupon it leaves, and waits for that
            self._folder.cleanup()


def serve() -> None:
    import git  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import torch
    import torch._dynamo  # an optimizer's first use imports it

    import dino_exp.attempts.run
    import dino_exp.attempts.work  # noqa: F401
    from dino_exp import train

    with torch.device("meta"):
        torch.nn.Linear(1, 1)  # the first use of the meta device imports a great deal
    gc.collect()
    gc.freeze()  # or each attempt copies the pages of all these objects when its garbage is collected
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.chdir(order["directory"])
            os.environ.clear()
            os.environ.update(order["environment"])
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train.main(order["arguments"])
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
