"""One attempt: take the run's lock, decide, write the records, train, and say how it ended.

The order on disk: the lock; settings, code and environment; `run.json` (from then on there is a run); checkpoints and
rows; `run.json` again. A process that dies between any two of these leaves a run that the same command continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.attempts.target import PACKAGE, Target
from dino_exp.config.canonical import canonical_text, group_hash
from dino_exp.config.stored import write_stored
from dino_exp.errors import DinoExpError, RefusedError
from dino_exp.fsio import make_dirs, write_atomic
from dino_exp.runs.code_identity import CodeRecord, record_code
from dino_exp.runs.environment import environment_record
from dino_exp.runs.events import EventLog
from dino_exp.runs.jsontext import pretty, utc_text
from dino_exp.runs.key import parse_run_key
from dino_exp.runs.lock import RunLock
from dino_exp.runs.plan import Start, decide
from dino_exp.runs.record import AttemptRecord, Best, CodeRef, RunRecord, Schedule, load_record, save_record
from dino_exp.runs.signals import SignalFlags

if TYPE_CHECKING:
    from rich.console import Console

    from dino_exp.training.loop import Outcome

log = logging.getLogger("dino_exp")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the user typed, for the records: the overrides and what Hydra composed of them."""

    overrides: Sequence[str]
    composed: Mapping[str, Any]


def run_attempt(target: Target, command: Command, console: Console) -> int:
    """Carry out one attempt, or say that there is nothing to do; the exit code.

    Raises LockedError, RefusedError, NoCheckpointError and other errors of the user's or the disk's.
    """
    start = start_of(target)
    if start.kind in ("finished", "stopped_already"):
        tell_nothing_to_do(target, start, console)
        return 0
    make_dirs(target.paths.directory)
    with SignalFlags() as signals, lock_of(target) as lock:
        target = replace(target, record=load_record(target.paths.run_json))  # the owner before us may have finished
        start = start_of(target)
        if start.kind in ("finished", "stopped_already"):
            tell_nothing_to_do(target, start, console)
            return 0
        outcome = Attempt(target, command, console, lock, signals).carry_out()
        if outcome.signum is None:
            return 0
        signals.call_previous(outcome.signum)
        return 128 + outcome.signum


def start_of(target: Target) -> Start:
    """Whether to start, continue, or leave the run alone. Raises RefusedError where other code is refused."""
    record = target.record
    stop_step = None
    if record is not None:
        train = target.config.train
        stops = [record.schedule.horizon_steps]
        stops += [train.stop_after_steps] if train.stop_after_steps is not None else []
        epochs = train.stop_after_epochs
        stops += [epochs * record.schedule.steps_per_epoch] if epochs is not None else []
        stop_step = min(stops)
    start = decide(record, code_id=target.key.code_id, stop_step=stop_step)
    if start.code_changed and start.kind == "continue" and target.config.run.on_code_change == "refuse":
        raise RefusedError(
            f"{target.paths.directory}: made by other code than this, and run.on_code_change=refuse; "
            "go on with `run.on_code_change=warn`, or leave `resume=` out for a new run"
        )
    return start


def lock_of(target: Target) -> RunLock:
    """The run's lock. Raises LockedError that names the owner."""
    return RunLock.acquire(
        target.paths,
        wait_secs=target.config.runtime.lock_wait_secs,
        attempt=1 if target.record is None else len(target.record.attempts) + 1,
        clock=time.time,
        sleep=time.sleep,
        say=log.warning,
    )


def tell_nothing_to_do(target: Target, start: Start, console: Console) -> None:
    """Say that the run is finished, or stopped where asked, and what can be done with it."""
    from dino_exp.loggers.console import print_facts

    record = target.record
    assert record is not None
    best = "none" if record.best is None else f"{record.best.metric} {record.best.value:.4f} at step {record.best.step}"
    rows = [("run", record.run_key), ("directory", str(target.paths.directory)), ("best", best)]
    rows += [("checkpoints", f"dino-exp checkpoints list {target.paths.directory}")]
    print_facts(console, f"Nothing to do: {start.reason}. Nothing was touched.", rows)


class Attempt:
    """One process working on a run whose lock it holds."""

    def __init__(self, target: Target, command: Command, console: Console, lock: RunLock, signals: SignalFlags) -> None:
        self.target, self.command, self.console = target, command, console
        self.lock, self.signals = lock, signals
        self.paths, self.config = target.paths, target.config
        self.number = 1 if target.record is None else len(target.record.attempts) + 1
        self.record: RunRecord | None = target.record

    def carry_out(self) -> Outcome:
        """Record, train, and record how it ended; the exception of a failed attempt is passed on."""
        self.lock.set_attempt(self.number)
        events = EventLog(self.paths.events, time.time)
        with contextlib.closing(events), logging_to(self.paths.log(), self.console):
            events.append("attempt_started", attempt=self.number, pid=os.getpid(), host=socket.gethostname())
            try:
                code = self.write_settings()
                from dino_exp.attempts.work import Work  # torch and everything heavy, after the lock is ours

                outcome = Work(self, code, events).train()
            except BaseException as error:
                self.end("failed", error)
                events.append("attempt_ended", attempt=self.number, outcome="failed", error=str(error))
                raise
            self.end(outcome.state)
            events.append("attempt_ended", attempt=self.number, outcome=outcome.state, signal=outcome.signum)
            return outcome

    def write_settings(self) -> CodeRecord:
        """The settings (once), what was typed (each time), the code and the environment."""
        paths = self.paths
        make_dirs(paths.attempt_hydra_dir(self.number))
        if self.record is None:
            write_stored(self.config, paths.directory)
            write_atomic(paths.environment, pretty(environment_record(argv=sys.argv, environ=os.environ)))
        write_atomic(paths.attempt_hydra_dir(self.number) / "overrides.yaml", _yaml(list(self.command.overrides)))
        write_atomic(paths.attempt_hydra_dir(self.number) / "config.yaml", _yaml(dict(self.command.composed)))
        if self.record is not None:
            write_atomic(
                paths.attempt_hydra_dir(self.number) / "diff.json",
                pretty([{"key": c.key, "was": c.was, "now": c.now, "verdict": c.verdict} for c in self.target.changes]),
            )
        return record_code(PACKAGE, paths.code_dir, attempt=self.number, leave_out=paths.directory.parent)

    def begin(self, code: CodeRecord, **facts: Any) -> None:
        """Write `run.json`: from now on there is a run, and it is running.

        `facts`: schedule, data_fingerprint, numerics, and why_not_exact of this attempt.
        """
        ref = CodeRef(id=code.id, commit=code.commit, dirty=code.dirty)
        record = self.record or RunRecord(
            run_key=self.run_key(),
            config_hash=self.target.key.config_hash,
            group_hash=group_hash(self.config),
            code=ref,
            schedule=Schedule(**facts["schedule"]),
            state="running",
            data_fingerprint=facts["data_fingerprint"],
            parent=None if self.target.parent is None else dict(self.target.parent),
            variant=self.config.run.variant,
            tags=self.config.run.tags,
            note=self.config.run.note or "",
            numerics=facts["numerics"],
        )
        reasons = tuple(facts["why_not_exact"])
        attempt = AttemptRecord(
            number=self.number,
            started_at=utc_text(time.time()),
            host=socket.gethostname(),
            pid=os.getpid(),
            code=ref,
            exact=not reasons,
            why_not_exact=reasons,
        )
        self.record = record.begin(attempt)
        save_record(self.paths.run_json, self.record)

    def run_key(self) -> str:
        """The directory's name; where the user chose the directory, the key all the same."""
        name = self.paths.directory.name
        return name if parse_run_key(name) is not None else self.target.key.text()

    def update(self, **changes: Any) -> None:
        """Replace fields of `run.json`."""
        assert self.record is not None
        self.record = replace(self.record, **changes)
        save_record(self.paths.run_json, self.record)

    def resumed(self, step: int) -> None:
        """Record the step that this attempt goes on from."""
        assert self.record is not None
        last = replace(self.record.attempts[-1], resumed_from=step)
        self.update(attempts=(*self.record.attempts[:-1], last))

    def end(self, state: str, error: BaseException | None = None) -> None:
        """Record how the attempt ended; a failure's traceback goes to FAILED.txt."""
        if error is not None:
            write_atomic(self.paths.failed, "".join(traceback.format_exception(error)))
        if self.record is not None and self.record.attempts and self.record.attempts[-1].outcome is None:
            text = None if error is None else _first_line(error)
            self.record = self.record.end(state, ended_at=utc_text(time.time()), error=text)
            save_record(self.paths.run_json, self.record)

    def canonical(self) -> str:
        """The text whose hash names the configuration, for every manifest."""
        return canonical_text(self.config)


def best_of(best: Any) -> Best | None:
    """The record's form of the training state's best evaluation."""
    return None if best is None else Best(step=best.step, metric=best.metric, value=best.value)


class ConsoleHandler(logging.Handler):
    """Warnings and errors on the user's console, above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        self.console.print(text, style="yellow", markup=False, soft_wrap=True)


@contextlib.contextmanager
def logging_to(path: Path, console: Console) -> Iterator[None]:
    """Write the program's log to the run's `train.log`, and its warnings to the console as well."""
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers = (to_file, ConsoleHandler(console))
    before = log.level
    log.setLevel(logging.INFO)
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(before)
        for handler in handlers:
            log.removeHandler(handler)
            handler.close()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    name = "" if isinstance(error, DinoExpError) else f"{type(error).__name__}: "
    return name + (text[0] if text else type(error).__name__)


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
