"""Weights & Biases, online and offline, always under the same id, and kept from everything that is not asked of it.

Offline, each attempt leaves a directory `wandb/offline-run-*` that holds the rows which the earlier ones do not;
`wandb sync` sends them one after the other. Online, the server says which rows it has.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dino_exp.errors import RefusedError, UsageError
from dino_exp.fsio import make_dirs
from dino_exp.loggers.delivery import Row, deliver_command, numbers_of
from dino_exp.loggers.wandb_file import history_steps, run_files

if TYPE_CHECKING:
    from types import ModuleType

    from wandb import Run

log = logging.getLogger(__name__)

ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
SETTLE_SECS = 4.0
"""So long after the death of a training its wandb process may still write: it looks for its parent now and then."""
_FLUSH_SECS = 0.5
_REACH_SECS = 10.0
_INIT_SECS = 30.0


class NoAccountError(UsageError):
    """W&B is to be reached, and nobody has told this machine with which key."""


def run_id(run_key: str) -> str:
    """The id of a run there: its key, or a digest of it where the key is too long for an id."""
    return run_key if ID.fullmatch(run_key) else hashlib.sha256(run_key.encode()).hexdigest()[:32]


class WandbRun:
    """One run of W&B. `secs_to_finish` is how long its own process may take to send what is left, at the end."""

    name = "Weights & Biases"

    def __init__(
        self,
        directory: Path,
        *,
        id: str,  # noqa: A002  (their word)
        mode: str,
        project: str,
        entity: str | None,
        label: str,
        tags: Sequence[str],
        note: str | None,
        config: Mapping[str, Any],
        secs_to_finish: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.folder, self.mode, self.clock, self.sleep = directory / "wandb", mode, clock, sleep
        self.config = dict(config)
        self.settings: dict[str, Any] = {
            "root_dir": str(directory), "run_id": id, "mode": mode, "project": project, "entity": entity,
            "run_name": label, "run_tags": tuple(tags), "run_notes": note, "resume": "allow",
            "finish_timeout": float(secs_to_finish), "finish_timeout_raises": True, "init_timeout": _INIT_SECS,
            "x_transaction_log_flush_interval": _FLUSH_SECS,  # what a kill may take from its file, and is sent again
            "console": "off", "silent": True, "symlink": False, "disable_git": True, "save_code": False,
            "disable_code": True, "disable_job_creation": True, "x_save_requirements": False,
            "x_disable_meta": True, "x_disable_machine_info": True, "x_disable_stats": True,
        }  # fmt: skip
        self._born_secs = clock()
        self._run: Run | None = None

    @property
    def remedy(self) -> str:
        """How the rest gets there."""
        verb = "writes" if self.mode == "offline" else "sends"
        command = deliver_command(self.folder.parent, "--wandb", self.mode)
        return f"the next attempt with logger=wandb {verb} them, or `{command}`"

    def open(self) -> int | None:
        """Begin or resume the run. Raises OSError where no server answers, NoAccountError, errors of wandb."""
        self._leave()
        for path in (self.folder, *self.folder.glob("*")):
            if path.is_symlink() and (path == self.folder or path.is_dir()):
                raise RefusedError(f"{path} is a link; a run's files must lie inside it. Remove it")
        wandb = _imported()
        self._let_settle()
        if self.mode == "offline":  # its directory is made with the first row: none is to be left without rows
            offline = run_files(self.folder, "offline-run")
            return max((step for path in offline for step in history_steps(path)), default=None)
        check_reachable(wandb.setup().settings.base_url)
        if not wandb.login(prompt=False, verify=False):
            raise NoAccountError("no API key on this machine; give it one with `wandb login`")
        self._run = self._begun()
        log.info("wandb run: %s", self._run.url)
        return self._run.starting_step - 1 if self._run.resumed else None

    def deliver(self, rows: Sequence[Row]) -> None:
        """Hand rows to W&B's process, which writes them to its file and, online, sends them."""
        if self._run is None:
            self._run = self._begun()
        for row in rows:
            self._run.log(numbers_of(row), step=row["step"], commit=True)

    def _begun(self) -> Run:
        wandb = _imported()
        make_dirs(self.folder)
        settings = wandb.Settings(**self.settings)
        run: Run = wandb.init(config=self.config, settings=settings, reinit="create_new")
        return run

    def close(self, secs: float, outcome: str) -> None:
        """Let W&B's process finish. Raises TimeoutError where it could not send everything."""
        if self._run is None:
            return
        run, self._run = self._run, None
        if outcome == "preempted":
            run.mark_preempting()
        run.finish(exit_code=int(outcome not in ("completed", "stopped")))

    def abandon(self) -> None:
        """End W&B's process: at its end the interpreter would wait for it, which waits for the server.

        There is no public way to it. Where a later version has put it elsewhere, the program ends a little later.
        """
        connection = getattr(_imported().setup(), "_connection", None)
        process = getattr(getattr(connection, "_proc", None), "_process", None)
        forget_exit_hook = getattr(connection, "_cleanup", None)
        if isinstance(process, subprocess.Popen) and callable(forget_exit_hook):
            forget_exit_hook()  # or it would speak to a dead process
            process.kill()

    def _leave(self) -> None:
        """What an error has left, before another try: its file is read as that of an earlier attempt."""
        if self._run is not None:
            run, self._run = self._run, None
            try:
                run.finish(exit_code=1)
            except Exception as problem:  # noqa: BLE001  (it had failed before; the new try tells how it is now)
                log.info("wandb could not finish: %s", problem)

    def _let_settle(self) -> None:
        if run_files(self.folder, "*run"):
            self.sleep(max(0.0, SETTLE_SECS - (self.clock() - self._born_secs)))


def _imported() -> ModuleType:
    """wandb, told to keep quiet: it would print to the console of the training."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # to the makers of wandb
    import wandb

    wandb.setup(settings=wandb.Settings(silent=True))
    logging.getLogger("wandb").propagate = False  # it writes a log of its own into its folder
    return wandb


def check_reachable(base_url: str) -> None:
    """Raises OSError where nobody answers at the address; W&B itself would try for very long, in a folder each time."""
    found = urlsplit(base_url)
    host, port = found.hostname or "", found.port or (80 if found.scheme == "http" else 443)
    if getproxies().get(found.scheme) and not proxy_bypass(host):
        return  # only the proxy knows
    try:
        socket.create_connection((host, port), timeout=_REACH_SECS).close()
    except OSError as problem:
        raise OSError(
            f"{host}:{port} does not answer: {os.strerror(problem.errno) if problem.errno else problem}"
        ) from problem
