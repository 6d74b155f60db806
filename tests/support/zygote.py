"""Real trainings without the wait for imports: one process imports everything, and forks for each attempt.

An attempt is a process of its own, of a session of its own, that runs the entry point, and can be killed like any
other.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TYPED = [
    "experiment=digits",
    "a.b=1",
    "++a.b_c=1.5e-3",
    "a=[1,2]",
    "b=true",
    "c=null",
    "d=1,2",
    "e=/tmp/x-1.0",
    "f='a b'",
]


@dataclass
class Crew:
    """The processes of one attempt, by rank; each has a session of its own, of the number of its process."""

    server: Zygote
    pids: list[int]
    logs: list[Path]
    codes: list[int] | None = None

    def end_within(self, secs: float) -> bool:
        """Wait for the end of all, for `secs` at most; whether it came."""
        return self.codes is not None or self.server.has_answer(secs)

    def wait(self) -> list[int]:
        """Their exit codes; minus the signal's number where a signal killed one."""
        if self.codes is None:
            self.codes = json.loads(self.server.read())
        return self.codes

    def kill(self, number: int = signal.SIGKILL, rank: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def kill_all(self) -> None:
        """Nothing of them is left, whatever processes they have started."""
        for pid in self.pids if self.codes is None else ():
            with contextlib.suppress(ProcessLookupError):  # it may have come to its end, unasked
                os.killpg(pid, signal.SIGKILL)
        self.wait()

    def output(self, rank: int = 0) -> str:
        """What one has printed, on both streams."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""


@dataclass
class Attempt:
    """One attempt by one process."""

    crew: Crew

    @property
    def pid(self) -> int:
        return self.crew.pids[0]

    def ends_within(self, secs: float) -> bool:
        """Wait for its end, for `secs` at most; whether it came."""
        return self.crew.end_within(secs)

    def wait(self) -> int:
        """Its exit code; minus the signal's number when a signal killed it."""
        return self.crew.wait()[0]

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.crew.kill(number)

    def output(self) -> str:
        """What it has printed, on both streams."""
        return self.crew.output()


class Zygote:
    """Forks attempts on demand, one at a time. `read_at_start` is for whoever wants to know whether it will do."""

    def __init__(self, environment: Mapping[str, str], read_at_start: Mapping[str, str]) -> None:
        self.read_at_start = read_at_start
        self._folder = tempfile.TemporaryDirectory(prefix="attempts-")
        self._num_started = 0
        self._last: Crew | None = None
        places = [environment.get("PYTHONPATH", ""), *sys.path]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], text=True, bufsize=1, cwd=self._folder.name,
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, places))},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.read() == "ready"

    def start(self, arguments: Sequence[str], directory: Path, environment: Mapping[str, str]) -> Attempt:
        """Begin an attempt in a directory."""
        return Attempt(self.start_crew(arguments, directory, [environment]))

    def start_crew(
        self, arguments: Sequence[str], directory: Path, environments: Sequence[Mapping[str, str]], call: str = ""
    ) -> Crew:
        """Begin an attempt by several processes, or a `call` ("module:function") of them with these arguments.

        Those that a failed test has left running are killed first.
        """
        if self._last is not None:
            self._last.kill_all()
        logs = [Path(self._folder.name) / f"{self._num_started}.{rank}.txt" for rank in range(len(environments))]
        self._num_started += 1
        order = {
            "arguments": list(arguments), "directory": str(directory), "call": call,
            "environments": list(map(dict, environments)), "logs": list(map(str, logs)),
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._last = Crew(self, json.loads(self.read()), logs)
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


def asked_mode(hydra: Any, config_name: str | None, overrides: Sequence[str]) -> None:
    """What `Hydra.get_mode` finds, which composes everything to look whether `hydra.mode` is set: here it never is."""
    assert not any("hydra.mode" in word for word in overrides)


def serve() -> None:
    import git  # noqa: F401
    import sklearn.datasets
    import sklearn.model_selection  # noqa: F401
    import torch
    import torch._dynamo  # an optimizer's first use imports it
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.plugins import Plugins

    import dino_exp.attempts.banner
    import dino_exp.attempts.fork
    import dino_exp.attempts.live_report
    import dino_exp.attempts.together
    import dino_exp.attempts.work
    import dino_exp.checkpoint.sharding.team
    import dino_exp.train
    import dino_exp.training.profiling
    import dino_exp.training.sharded  # noqa: F401

    Hydra.get_mode = asked_mode  # type: ignore[method-assign]
    Plugins.instance()  # imports Hydra's launchers
    OverridesParser.create().parse_overrides(TYPED)  # a parser learns its grammar as it meets it
    with torch.device("meta"):
        torch.nn.Linear(1, 1)  # the first use of the meta device imports a great deal
    gc.collect()
    gc.freeze()  # or each attempt copies the pages of all these objects when its garbage is collected
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pids = [
            fork(order, environment, log) for environment, log in zip(order["environments"], order["logs"], strict=True)
        ]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


def fork(order: Mapping[str, Any], environment: Mapping[str, str], log: str) -> int:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(order["directory"])
        os.environ.clear()
        os.environ.update(environment)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        try:
            if order["call"]:
                module, _, function = order["call"].partition(":")
                sys.exit(getattr(importlib.import_module(module), function)(*order["arguments"]))
            from dino_exp import train

            train.main(order["arguments"])
        except SystemExit as leaving:
            leave(leaving)
    return pid


def leave(leaving: SystemExit) -> None:
    """End as an interpreter does, but for taking apart all that the server has imported: a quarter of an attempt."""
    if not isinstance(leaving.code, int | None):
        raise leaving
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()  # what nobody has closed is told now
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(leaving.code or 0)


if __name__ == "__main__":
    serve()
