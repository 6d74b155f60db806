"""What became of a job of a sweep, as its run says itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_exp.config.typed import train_command
from dino_exp.errors import DinoExpError
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.jsontext import Json
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import probe
from dino_exp.runs.record import RunRecord, load_record, shown_state
from dino_exp.sweeps.record import JobRecord, SweepRecord

OUTCOME_COLUMNS = ("job", "run", "state", "best", "overrides", "error")
WELL = ("completed", "stopped")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One job now. `state` is None where no run has begun; `error` is its first line, or empty."""

    job: JobRecord
    options: tuple[str, ...]
    state: str | None
    record: RunRecord | None = None
    paths: RunPaths | None = None
    error: str = ""
    traceback: Path | None = None

    @property
    def shown_state(self) -> str:
        """Its state, for people."""
        return self.state or "not begun"

    @property
    def is_well(self) -> bool:
        """Whether it has come to its end, or to where it was to stop."""
        return self.state in WELL

    @property
    def has_failed(self) -> bool:
        """Whether it ended badly, or cannot begin."""
        return self.state == "failed" or self.job.problem is not None

    @property
    def run_key(self) -> str | None:
        """The key of its run."""
        return self.job.run_key

    @property
    def best(self) -> str:
        """Its best evaluation, for people."""
        found = None if self.record is None else self.record.best
        return "–" if found is None else f"{found.metric} {found.value:.4f}"

    @property
    def command(self) -> str:
        """The line that does this job alone."""
        return train_command(*self.options, *self.job.overrides)


def outcomes_of(sweep: SweepRecord, outputs: Path) -> list[Outcome]:
    """Look at the runs of all jobs. A run that cannot be read is an outcome, too."""
    return [_outcome(job, sweep.options, outputs) for job in sweep.jobs]


def _outcome(job: JobRecord, options: tuple[str, ...], outputs: Path) -> Outcome:
    paths = job.paths(outputs)
    if paths is None:
        return Outcome(job=job, options=options, state=None, error=first_line(job.problem or ""))
    try:
        record = load_record(paths.run_json)
        failure = _failed_at_once(paths) if record is None else None
    except (DinoExpError, OSError) as damage:
        return Outcome(job=job, options=options, state=None, error=first_line(str(damage)))
    if record is None:
        state, error = (None, job.problem or "") if failure is None else ("failed", failure)
    else:
        held = True
        with contextlib.suppress(DinoExpError):
            held = probe(paths, clock=time.time) is not None
        state = shown_state(record, held)
        error = (record.attempts[-1].error if record.attempts else None) or ""
    return Outcome(
        job=job,
        options=options,
        state=state,
        record=record,
        paths=None if record is None else paths,
        error=first_line(error),
        traceback=paths.failed if state == "failed" and paths.failed.is_file() else None,
    )


def _failed_at_once(paths: RunPaths) -> str | None:
    """Why the last attempt failed before there was a run; None where it did not. Raises DamagedFileError, OSError."""
    last: dict[str, Json] = {}
    for event in read_lines(paths.events):
        last = event if str(event.get("kind")).startswith("attempt_") else last
    return str(last.get("error") or "") if last.get("outcome") == "failed" else None


def first_line(text: str) -> str:
    """Of a message of several."""
    return text.splitlines()[0] if text else ""


def outcome_lines(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A line for each job, below OUTCOME_COLUMNS."""
    swept = differing([one.job.overrides for one in outcomes])
    return [
        (str(number), one.run_key or "–", one.shown_state, one.best, swept[number], one.error)
        for number, one in enumerate(outcomes)
    ]


def differing(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Of the overrides of each job, those that not all of them have."""
    common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set[str]()
    return [" ".join(word for word in words if word not in common) for words in jobs]
