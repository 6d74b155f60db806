"""The records of one attempt: what was asked for, what it ran on, and how it went.

The order on disk: the lock; settings, code and environment; `run.json` (from then on there is a run); checkpoints and
rows; `run.json` again. A process that dies between any two of these leaves a run that the same command continues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.attempts.target import Target
from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.config.canonical import canonical_text, group_hash
from dino_exp.config.compose import touched_keys
from dino_exp.config.schema import RunConfig
from dino_exp.config.stored import write_stored
from dino_exp.errors import DinoExpError, LockedError
from dino_exp.fsio import LOCAL, DamagedFileError, make_dirs, write_atomic
from dino_exp.runs.code_identity import PACKAGE_DIR, CodeRecord, record_code
from dino_exp.runs.environment import environment_record
from dino_exp.runs.events import EventLog
from dino_exp.runs.job import job_of
from dino_exp.runs.jsontext import pretty, utc_text
from dino_exp.runs.key import LENGTHS
from dino_exp.runs.lock import RunLock
from dino_exp.runs.record import AttemptRecord, Best, CodeRef, RunRecord, Schedule, save_record
from dino_exp.runs.signals import SignalFlags
from dino_exp.runs.signature import own_key
from dino_exp.runs.signature import sign as sign_code

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("dino_exp")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the user typed, for the records: overrides, options of the command line, and what Hydra composed of them.

    `beside`: further overrides that this needs and that touch no setting (see `compose.touched_keys`).
    """

    overrides: Sequence[str]
    composed: Mapping[str, Any]
    options: Sequence[str] = ()
    beside: Sequence[str] = ()

    def touched(self) -> frozenset[str]:
        """The dotted keys that were typed. Raises ConfigError."""
        return touched_keys(self.overrides, self.beside)


class Attempt:
    """One process working on a run whose lock it holds."""

    def __init__(self, target: Target, command: Command, console: Console, lock: RunLock, signals: SignalFlags) -> None:
        self.target, self.command, self.console = target, command, console
        self.lock, self.signals = lock, signals
        self.paths, self.config = target.paths, target.config
        self.number = 1 if target.record is None else len(target.record.attempts) + 1
        self.record: RunRecord | None = target.record
        self._updating = threading.RLock()  # the loop and the thread that saves both update run.json
        self._catalogue = Catalogue(target.paths.directory.parent.parent)

    def fail(self, error: BaseException, events: EventLog) -> None:
        """Record a failed attempt, or an aborted one; the error itself goes on to the caller.

        Nothing is written unless this process surely still owns the run.
        """
        try:
            self.lock.check()
        except (LockedError, DamagedFileError) as problem:
            log.warning("not recorded: %s", problem)
            return
        outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        text = "".join(traceback.format_exception(error))
        log.info("attempt %d %s:\n%s", self.number, outcome, text)
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            # Before run.json knows of it, an attempt leaves no mark on those that it does know of.
            if outcome == "failed" and (self.has_begun or self.record is None):
                write_atomic(self.paths.failed, text)
            self.end(outcome, error=None if outcome == "interrupted" else _first_line(error))
            events.append("attempt_ended", attempt=self.number, outcome=outcome, error=_first_line(error))

    @property
    def has_begun(self) -> bool:
        """Whether `run.json` knows of this attempt: before that, a refusal must leave no mark on the earlier ones."""
        return self.record is not None and len(self.record.attempts) == self.number

    def write_settings(self) -> CodeRecord:
        """The settings (once), what was typed (each time), the code and the environment."""
        paths = self.paths
        make_dirs(paths.attempt_hydra_dir(self.number))
        if self.record is None:
            write_stored(self.config, paths.directory)
            write_atomic(paths.environment, pretty(environment_record(argv=sys.argv, environ=os.environ)))
        write_atomic(paths.attempt_hydra_dir(self.number) / "overrides.yaml", _yaml(list(self.command.overrides)))
        write_atomic(paths.attempt_hydra_dir(self.number) / "config.yaml", _yaml(dict(self.command.composed)))
        if self.command.options:
            write_atomic(paths.attempt_hydra_dir(self.number) / "options.yaml", _yaml(list(self.command.options)))
        if self.record is not None:
            write_atomic(
                paths.attempt_hydra_dir(self.number) / "diff.json",
                pretty([{"key": c.key, "was": c.was, "now": c.now, "verdict": c.verdict} for c in self.target.changes]),
            )
        runs = paths.directory.parent
        made = (paths.directory, runs, runs.parent, Path(self.config.paths.outputs), Path(self.config.paths.cache))
        key, run_key = own_key(os.environ, make=True), self.record.run_key if self.record else self.run_key()
        sign = (lambda _: None) if key is None else partial(sign_code, key, run_key)
        return record_code(PACKAGE_DIR, paths.code_dir, attempt=self.number, leave_out=made, sign=sign)

    def begin(self, code: CodeRecord, **facts: Any) -> None:
        """Write `run.json`: from now on there is a run, and it is running.

        `facts`: schedule, data_fingerprint, numerics, weights that it began with, and why_not_exact of this attempt.
        """
        ref = CodeRef(id=code.id, commit=code.commit, dirty=code.dirty)
        record = self.record and labelled(self.record, self.config.run, self.command)
        record = record or RunRecord(
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
            weights=facts["weights"],
        )
        reasons, job = tuple(facts["why_not_exact"]), job_of(os.environ)
        attempt = AttemptRecord(
            number=self.number,
            started_at=utc_text(time.time()),
            host=socket.gethostname(),
            pid=os.getpid(),
            code=ref,
            exact=not reasons,
            why_not_exact=reasons,
            job=None if job is None else job.name,
        )
        self.record = record.begin(attempt)
        self.lock.check()
        save_record(self.paths.run_json, self.record)
        self.note_in_catalogue()

    def run_key(self) -> str:
        """The directory's name where it is one of this key; where the user chose another, the key all the same."""
        name, key = self.paths.directory.name, self.target.key
        return name if name in (key.text(digits) for digits in LENGTHS) else key.text()

    def update(self, **changes: Any) -> None:
        """Replace fields of `run.json`, from any thread. A full disk is told, and does not stop the training.

        Raises LockedError when the run is another's now.
        """
        with self._updating:
            assert self.record is not None
            self.record = replace(self.record, **changes)
            self.lock.check()
            try:
                save_record(self.paths.run_json, self.record)
            except OSError as problem:
                log.warning("run.json could not be written (%s); training goes on", problem)

    def note_in_catalogue(self) -> None:
        """Let the catalogue know of the run as it is now; what it is not told, its readers find out themselves."""
        self._catalogue.update(self.paths.directory)

    def resumed(self, step: int, best: Best | None, reasons: Sequence[str]) -> None:
        """Record the step that this attempt goes on from, its best until then, and why it was not exact any more."""
        assert self.record is not None
        last = self.record.attempts[-1]
        why = tuple(dict.fromkeys((*reasons, *last.why_not_exact)))
        last = replace(last, resumed_from=step, exact=not why, why_not_exact=why)
        self.update(attempts=(*self.record.attempts[:-1], last), best=best)

    def end(self, state: str, *, step: int | None = None, error: str | None = None) -> None:
        """Record how the attempt ended, and at which step where nothing is ever saved; FAILED.txt goes at a good end.

        Its traceback stays in `train.log`.
        """
        if self.record is None or not self.has_begun or self.record.attempts[-1].outcome is not None:
            return
        if step is not None and step > self.record.step:
            per_epoch = self.record.schedule.steps_per_epoch
            self.record = replace(self.record, step=step, epochs_done=step // per_epoch)
        self.record = self.record.end(state, ended_at=utc_text(time.time()), error=error)
        self.update()
        self.note_in_catalogue()
        if error is None and LOCAL.size(self.paths.failed) is not None:
            LOCAL.unlink(self.paths.failed)

    def canonical(self) -> str:
        """The text whose hash names the configuration, for every manifest."""
        return canonical_text(self.config)


def labelled(record: RunRecord, run: RunConfig, command: Command) -> RunRecord:
    """The record with the tags and the note that a later attempt was given; what it was not given stays."""
    tags, note = run.tags, run.note or ""
    if (tags, note) == (record.tags, record.note):
        return record
    touched = command.touched()
    return replace(
        record,
        tags=tags if "run.tags" in touched else record.tags,
        note=note if "run.note" in touched else record.note,
    )


def best_of(best: Any) -> Best | None:
    """The record's form of the training state's best evaluation."""
    return None if best is None else Best(step=best.step, metric=best.metric, value=best.value)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    name = "" if isinstance(error, DinoExpError) else f"{type(error).__name__}: "
    return name + (text[0] if text else type(error).__name__)


def _yaml(value: Any) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
