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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.attempts.target import PACKAGE, Target
from dino_exp.config.canonical import canonical_text, group_hash
from dino_exp.config.stored import write_stored
from dino_exp.errors import DinoExpError, LockedError, RefusedError
from dino_exp.fsio import LOCAL, make_dirs, write_atomic
from dino_exp.runs.code_identity import CodeRecord, record_code
from dino_exp.runs.environment import environment_record
from dino_exp.runs.events import EventLog
from dino_exp.runs.jsontext import pretty, utc_text
from dino_exp.runs.key import LENGTHS
from dino_exp.runs.lock import RunLock
from dino_exp.runs.plan import Start, decide
from dino_exp.runs.record import AttemptRecord, Best, CodeRef, RunRecord, Schedule, save_record
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


def run_attempt(find_target: Callable[[], Target], command: Command, console: Console) -> int:
    """Carry out one attempt at the run that `find_target` finds, or say that there is nothing to do; the exit code.

    Raises LockedError, RefusedError, NoCheckpointError and other errors of the user's or the disk's.
    """
    target = find_target()
    if is_done(target, console):
        return 0
    make_dirs(target.paths.directory)
    with SignalFlags() as signals, lock_of(target, signals) as lock:
        found = find_target()  # the owner before us may have changed everything that was decided above
        if found.paths != target.paths:
            raise LockedError(f"{target.paths.directory}: another run took this name meanwhile; type the command again")
        if is_done(found, console):
            return 0
        outcome = Attempt(found, command, console, lock, signals).carry_out()
        if outcome.signum is None:
            return 0
        signals.call_previous(outcome.signum)
        return 128 + outcome.signum


def is_done(target: Target, console: Console) -> bool:
    """Whether nothing is left to do, which is then told."""
    start = start_of(target)
    if start.kind not in ("finished", "stopped_already"):
        return False
    tell_nothing_to_do(target, start, console)
    return True


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


class StoppedWaitingError(DinoExpError):
    """A stop signal came while the process waited for the run's owner."""

    def __init__(self, signum: int) -> None:
        super().__init__("stopped while waiting for the run's owner; nothing was done")
        self.exit_code = 128 + signum


def lock_of(target: Target, signals: SignalFlags) -> RunLock:
    """The run's lock. Raises LockedError that names the owner, StoppedWaitingError."""

    def sleep(secs: float) -> None:
        if signals.stop_signal is not None:
            raise StoppedWaitingError(signals.stop_signal)
        time.sleep(secs)

    return RunLock.acquire(
        target.paths,
        wait_secs=target.config.runtime.lock_wait_secs,
        attempt=1 if target.record is None else len(target.record.attempts) + 1,
        clock=time.time,
        sleep=sleep,
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

                work = Work(self, code, events)
                outcome = work.train()
            except LockedError:
                raise  # the run is another's now: nothing in it may be written
            except BaseException as error:
                self.fail(error, events)
                raise
            self.end(outcome.state, step=outcome.step)
            events.append("attempt_ended", attempt=self.number, outcome=outcome.state, signal=outcome.signum)
            work.tell_end(outcome)
            return outcome

    def fail(self, error: BaseException, events: EventLog) -> None:
        """Record a failed attempt, or an aborted one; the error itself goes on to the caller."""
        if isinstance(error, KeyboardInterrupt):
            self.end("interrupted")
            events.append("attempt_ended", attempt=self.number, outcome="interrupted")
            return
        text = "".join(traceback.format_exception(error))
        log.info("attempt %d failed:\n%s", self.number, text)
        write_atomic(self.paths.failed, text)
        self.end("failed", error=_first_line(error))
        events.append("attempt_ended", attempt=self.number, outcome="failed", error=_first_line(error))

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
        """The directory's name where it is one of this key; where the user chose another, the key all the same."""
        name, key = self.paths.directory.name, self.target.key
        return name if name in (key.text(digits) for digits in LENGTHS) else key.text()

    def update(self, **changes: Any) -> None:
        """Replace fields of `run.json`. A full disk is told, and does not stop the training.

        Raises LockedError when the run is another's now.
        """
        assert self.record is not None
        self.record = replace(self.record, **changes)
        self.lock.check()
        try:
            save_record(self.paths.run_json, self.record)
        except OSError as problem:
            log.warning("run.json could not be written (%s); training goes on", problem)

    def resumed(self, step: int, reasons: Sequence[str]) -> None:
        """Record the step that this attempt goes on from, and why its checkpoint was not exact any more."""
        assert self.record is not None
        last = self.record.attempts[-1]
        why = tuple(dict.fromkeys((*reasons, *last.why_not_exact)))
        last = replace(last, resumed_from=step, exact=not why, why_not_exact=why)
        self.update(attempts=(*self.record.attempts[:-1], last))

    def end(self, state: str, *, step: int | None = None, error: str | None = None) -> None:
        """Record how the attempt ended, and at which step where nothing is ever saved; FAILED.txt goes at a good end.

        Its traceback stays in `train.log`.
        """
        if self.record is None or not self.record.attempts or self.record.attempts[-1].outcome is not None:
            return
        if step is not None and step > self.record.step:
            per_epoch = self.record.schedule.steps_per_epoch
            self.record = replace(self.record, step=step, epochs_done=step // per_epoch)
        self.record = self.record.end(state, ended_at=utc_text(time.time()), error=error)
        self.update()
        if error is None and LOCAL.size(self.paths.failed) is not None:
            LOCAL.unlink(self.paths.failed)

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
