"""Start real trainings and read what they wrote."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.zygote import Attempt, Crew, Zygote

_state = tempfile.mkdtemp(
    prefix="state-"
)  # where these trainings keep their key: not in the home of who runs the tests
atexit.register(shutil.rmtree, _state, ignore_errors=True)
ENVIRONMENT = {
    **os.environ,
    "XDG_STATE_HOME": _state,
    "CUDA_VISIBLE_DEVICES": "",  # what they expect is what a processor gives; tests of devices ask for them
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}
READ_AT_START = ("PYTHONPATH", "PYTHONWARNINGS", "OMP_NUM_THREADS")
RECIPE = ("experiment=digits_smoke", "runtime.threads=1")
# A third of the time of the recipe itself: what most tests are about happens between the steps.
SMOKE = (
    *RECIPE, "model.embed_dim=16", "model.depth=1", "model.num_heads=2", "augment.num_local_crops=1",
)  # fmt: skip


_stores: list[Any] = []  # of the last launches: as with torchrun, a rendezvous outlives the ranks


def ranks_of(size: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environments of `size` processes that torchrun starts on one host, with the store that its agent keeps."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores[:] = [*_stores[-3:], store]
    return [
        {
            **environment,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        for rank in range(size)
    ]  # fmt: skip


def without_agent(environments: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The same as a launcher has them that keeps no store (srun, submitit): that of rank 0 ends with rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [{**one, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"} for one in environments]


_servers: list[Zygote] = []
_MOST_SERVERS = 2  # the usual one, and one for a test that wants another environment


@atexit.register
def close_servers() -> None:
    while _servers:
        _servers.pop().close()


def zygote(environment: Mapping[str, str]) -> Zygote:
    """The server for what the interpreter reads in the environment at its start; those used last are kept."""
    wanted = {name: environment[name] for name in READ_AT_START if name in environment}
    found = next((server for server in _servers if server.read_at_start == wanted), None)
    if found is not None:
        _servers.remove(found)
    elif len(_servers) == _MOST_SERVERS:
        _servers.pop(0).close()
    _servers.append(found or Zygote(environment, wanted))
    return _servers[-1]


@dataclass
class Lab:
    """One outputs directory, and the commands that write to it. Run in `directory`, away from the repository."""

    directory: Path
    settings: tuple[str, ...] = SMOKE
    environment: dict[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))

    @property
    def outputs(self) -> Path:
        return self.directory / "outputs"

    def command(self, *overrides: str) -> list[str]:
        words = [*self.settings, f"paths.outputs={self.outputs}", *overrides]
        words.sort(key=lambda word: not word.startswith("--"))  # Hydra takes options before or after all overrides
        return [sys.executable, "-m", "dino_exp.train", *words]

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """The command as users type it, imports and all."""
        return subprocess.Popen(
            self.command(*overrides), cwd=self.directory, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def fork(self, *overrides: str) -> Attempt:
        """The same command in a process that is forked from one that has imported everything."""
        return zygote(self.environment).start(self.command(*overrides)[3:], self.directory, self.environment)

    def launch(
        self, size: int, *overrides: str, environment: Mapping[str, str] | None = None, agent: bool = True
    ) -> Crew:
        """The command in several processes, as torchrun starts them (`ranks_of`), or as others do (`without_agent`)."""
        environments = ranks_of(size, {**self.environment, **(environment or {})})
        environments = environments if agent else without_agent(environments)
        return zygote(self.environment).start_crew(self.command(*overrides)[3:], self.directory, environments)

    def train_together(self, size: int, *overrides: str, codes: Sequence[int] = ()) -> list[str]:
        """The same to the end; what each printed. Fails unless they leave with these exit codes, 0 unless given."""
        crew = self.launch(size, *overrides)
        printed = [crew.output(rank) for rank in range(size)] if crew.wait() else []
        assert crew.codes == (list(codes) or [0] * size), f"exit {crew.codes}:\n" + "\n---\n".join(printed)
        return printed

    def call_together(self, size: int, function: str, *arguments: str) -> dict[str, Any]:
        """What several processes tell that each call a function of `support.rank_checks`."""
        environments = ranks_of(size, self.environment)
        call = f"support.rank_checks:{function}"
        crew = zygote(self.environment).start_crew(arguments, self.directory, environments, call)
        codes = crew.wait()
        printed = [crew.output(rank) for rank in range(size)]
        assert codes == [0] * size, f"exit {codes}:\n" + "\n---\n".join(printed)
        (told,) = (line for line in printed[0].splitlines() if line.startswith("TOLD "))
        found: dict[str, Any] = json.loads(told.removeprefix("TOLD "))
        return found

    def train(self, *overrides: str, code: int = 0) -> str:
        """Run to the end, in a forked process; what it printed. Fails unless it leaves with exit code `code`."""
        attempt = self.fork(*overrides)
        assert attempt.wait() == code, f"exit {attempt.wait()}, expected {code}:\n{attempt.output()}"
        return attempt.output()

    def evaluate(self, *overrides: str, code: int = 0) -> str:
        """`python -m dino_exp.evaluate` in a forked process; what it printed. Fails unless it leaves with `code`."""
        words = [*overrides, f"paths.outputs={self.outputs}"]
        call = "support.runs:evaluate_here"
        crew = zygote(self.environment).start_crew(words, self.directory, [self.environment], call)
        assert crew.wait() == [code], f"exit {crew.codes}, expected {code}:\n{crew.output()}"
        return crew.output()

    def time(self, *overrides: str) -> float:
        """The seconds that `train` takes, without the start of its server."""
        zygote(self.environment)
        started = time.monotonic()
        self.train(*overrides)
        return time.monotonic() - started

    def cli(self, *arguments: str, code: int = 0) -> str:
        """`dino-exp ...` to the end; what it printed on standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "dino_exp", *arguments], cwd=self.directory, env=self.environment, text=True,
            check=False, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, f"exit {done.returncode}, expected {code}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr if code else done.stdout

    def runs(self) -> list[Path]:
        return sorted((self.outputs / "runs").iterdir()) if (self.outputs / "runs").exists() else []

    def run_with_a_save(self, secs: float = 100) -> Path:
        """The only run, once it has begun and committed a checkpoint."""
        until = time.monotonic() + secs
        while (
            not self.runs() or not (self.only_run() / "events.jsonl").exists() or not events(self.only_run(), "saved")
        ):
            assert time.monotonic() < until
            time.sleep(0.05)
        return self.only_run()

    def only_run(self) -> Path:
        (run,) = self.runs()
        return run


def evaluate_here(*words: str) -> None:
    from dino_exp import evaluate

    evaluate.main(words)


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics without clock readings."""
    made = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "wall"} for row in made]


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    made = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in made if kind in (None, event["kind"])]


def manifests(run: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((run / "checkpoints").glob("step-*.json"))]
    return {manifest["step"]: manifest for manifest in found}


def last_digest(run: Path) -> str:
    """The digest of the state in the newest checkpoint."""
    made = manifests(run)
    return str(made[max(made)]["state_digest"])


def assert_same_end(run: Path, reference: Path) -> None:
    """Both runs ended in the same bits, and wrote the same rows."""
    assert rows(run) == rows(reference)
    assert last_digest(run) == last_digest(reference)
