"""Carry out a command: take the run's lock, decide, train, and answer with the exit code.

Light to import: a finished run and a refused command must not wait for torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dino_exp.attempts.attempt import Attempt, Command
from dino_exp.attempts.data_files import check_data
from dino_exp.attempts.target import Target
from dino_exp.attempts.tracking import check_packages
from dino_exp.errors import DinoExpError, LockedError, RefusedError
from dino_exp.fsio import make_dirs
from dino_exp.runs.events import EventLog
from dino_exp.runs.lock import RunLock
from dino_exp.runs.plan import Start, decide
from dino_exp.runs.signals import SignalFlags

if TYPE_CHECKING:
    from rich.console import Console

    from dino_exp.attempts.work import Work
    from dino_exp.dist.ranks import ManyRanks
    from dino_exp.training.loop import Outcome

log = logging.getLogger("dino_exp")


def run_attempt(
    find_target: Callable[[], Target], command: Command, console: Console, ranks: ManyRanks | None = None
) -> int:
    """Carry out one attempt at the run that `find_target` finds, or say that there is nothing to do; the exit code.

    `ranks`: the other processes that it is carried out with (see `together`); this one is their first.

    Raises LockedError, RefusedError, NoCheckpointError and other errors of the user's or the disk's.
    """
    target = find_target()
    if is_done(target, console):
        return 0
    check_packages(target.config.logger)
    check_data(target.config.data)
    make_dirs(target.paths.directory)
    with SignalFlags() as signals, lock_of(target, signals) as lock:
        found = find_target()  # the owner before us may have changed everything that was decided above
        if found.paths != target.paths:
            raise LockedError(
                f"{target.paths.directory}: the run that this command names changed meanwhile; type it again"
            )
        if is_done(found, console):
            return 0
        outcome = carry_out(Attempt(found, command, console, lock, signals), ranks)
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


def carry_out(attempt: Attempt, ranks: ManyRanks | None = None) -> Outcome:
    """Record, train, and record how it ended; the exception of a failed attempt is passed on."""
    refuse_links(attempt)
    refuse_odd_log(attempt.paths.log())
    if ranks is not None:
        from dino_exp.attempts.together import tell_to_train

        tell_to_train(attempt, ranks)
    attempt.lock.set_attempt(attempt.number)
    events = EventLog(attempt.paths.events, time.time)
    with contextlib.closing(events), logging_to(attempt.paths.log(), attempt.console):
        events.append("attempt_started", attempt=attempt.number, pid=os.getpid(), host=socket.gethostname())
        work: Work | None = None
        gc.disable()  # until training begins: what is imported and built stays, and looking through it takes long
        try:
            code = attempt.write_settings()
            from dino_exp.attempts import work as heavy  # torch and all, after the lock is ours

            work = heavy.Work(attempt, code, events) if ranks is None else heavy.Work(attempt, code, events, ranks)
            outcome = work.train()
        except LockedError:
            raise  # the run is another's now: nothing in it may be written
        except BaseException as error:
            attempt.fail(error, events)
            if attempt.has_begun and work is not None:
                work.end_report(None)
            raise
        finally:
            gc.enable()
        attempt.end(outcome.state, step=outcome.step)
        events.append("attempt_ended", attempt=attempt.number, outcome=outcome.state, signal=outcome.signum)
        work.end_report(outcome)
        work.trackers.end(outcome.state)  # everything of ours is recorded: a kill while we wait here costs nothing
        work.tell_end(outcome)
        return outcome


def refuse_links(attempt: Attempt) -> None:
    """What this attempt writes below the run's directory lies there. Raises RefusedError for a part that leads out."""
    paths = attempt.paths
    folders = [paths.hydra_dir, paths.attempt_hydra_dir(2).parent, paths.attempt_hydra_dir(attempt.number)]
    folders += [
        paths.tensorboard,
        paths.profile,
        paths.code_dir,
        paths.code_dir / "attempts",
        paths.code_dir / "attempts" / f"{attempt.number:03d}",
    ]
    for path in folders:
        if path.is_symlink():
            raise RefusedError(f"{path} is a link; a run's files must lie inside it. Remove it")


def refuse_odd_log(path: Path) -> None:
    """A log, of whichever rank, is a file of the run. Raises RefusedError for a link or a pipe."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise RefusedError(f"{path} is a link or a special file; a run's files must lie inside it. Remove it")


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
    rows += [("checkpoints", f"dino-exp checkpoints list {shlex.quote(str(target.paths.directory))}")]
    print_facts(console, f"Nothing to do: {start.reason}. Nothing was touched.", rows)


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
def logging_to(path: Path, console: Console | None) -> Iterator[None]:
    """Write the program's log to a file in the run's directory, and its warnings to the console, if there is one."""
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [to_file, *([] if console is None else [ConsoleHandler(console)])]
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
