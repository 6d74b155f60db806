"""Real training processes without the wait for imports: one process imports everything, and forks for each attempt.

An attempt is a process of its own that runs the entry point, and can be killed like any other.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from support.runs import Lab


class Zygote:
    """Forks trainings on demand. A context manager."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        places = [lab.environment.get("PYTHONPATH", ""), *sys.path]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], cwd=lab.directory, text=True, bufsize=1,
            env={**lab.environment, "PYTHONPATH": os.pathsep.join(filter(None, places))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Zygote:
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(30) == 0

    def start(self, *overrides: str) -> int:
        """Begin an attempt; its process number."""
        arguments = [*self.lab.settings, f"paths.outputs={self.lab.outputs}", *overrides]
        assert self.process.stdin is not None
        self.process.stdin.write(
            json.dumps({"arguments": arguments, "log": str(self.lab.directory / "log.txt")}) + "\n"
        )
        return int(self._read())

    def wait(self) -> int:
        """The exit code of the attempt; -9 when it was killed."""
        return int(self._read())

    def ends_within(self, secs: float) -> bool:
        """Wait for the attempt's end, for `secs` at most; whether it came. Its exit code is still to be read."""
        return bool(select.select([self.process.stdout], [], [], secs)[0])

    def train(self, *overrides: str, code: int = 0) -> float:
        """An attempt to its end; its seconds."""
        started = time.monotonic()
        self.start(*overrides)
        found = self.wait()
        assert found == code, (self.lab.directory / "log.txt").read_text()[-3000:]
        return time.monotonic() - started

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the zygote has died"
        return line


def serve() -> None:
    import torch
    import torch._dynamo  # an optimizer's first use imports it

    from dino_exp import train

    with torch.device("meta"):
        torch.nn.Linear(1, 1)  # the first use of the meta device imports a great deal
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train.main(order["arguments"])
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
