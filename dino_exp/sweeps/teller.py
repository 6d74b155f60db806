"""Tells of a sweep: the plan before it, the record beside its runs, and the table after it."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dino_exp.attempts.live_report import SWEEP_VARIABLE, begin_sweep_page
from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.catalogue.database import CatalogueError
from dino_exp.config.canonical import group_hash
from dino_exp.dist.place import place_of
from dino_exp.errors import STOPPING
from dino_exp.runs.jsontext import utc_text
from dino_exp.sweeps.outcome import OUTCOME_COLUMNS, Outcome, differing, first_line, outcome_lines, outcomes_of
from dino_exp.sweeps.plan import ACTIONS, FindTarget, PlannedJob, plan_jobs, refuse_other_outputs, refuse_uncomposable
from dino_exp.sweeps.record import (
    PAGE,
    JobRecord,
    SweepRecord,
    load_sweep,
    resume_command,
    save_sweep,
    sweep_name,
    sweep_path,
)
from dino_exp.words import duration_text

if TYPE_CHECKING:
    from dino_exp.config.multirun import Sweep

Say: TypeAlias = Callable[[str], object]
RunJob: TypeAlias = Callable[[Sequence[str], Sequence[str]], int]
"""Runs one job in a process of its own: its overrides, options of the command line -> exit code."""
PrintTable: TypeAlias = Callable[[Sequence[str], Sequence[Sequence[str]]], object]

_PAGE_SECS = 60.0


class SweepTeller:
    """Watches one sweep in the process that the user started."""

    def __init__(self, find_target: FindTarget, print_table: PrintTable, say: Say, run_job: RunJob) -> None:
        self._find_target, self._print_table, self._say, self._run_job = find_target, print_table, say, run_job
        self._recorded: tuple[Path, SweepRecord] | None = None
        self._outputs, self._num_jobs = Path(), 0

    def starts(self, sweep: Sweep) -> int | None:
        """Plan, print, record. An exit code where nothing is to be done: `sweep.dry_run`, `plan`, or all is finished.

        Raises RefusedError where two jobs are one run, UsageError in one of several ranks, OSError.
        """
        place_of(os.environ).refuse_sweep()  # before anything is written
        asked, self._outputs = sweep.settings, sweep.outputs
        name = sweep_name(asked.name, sweep.typed)
        path = sweep_path(self._outputs, name)
        if sweep.jobs is None:
            self._say(f"sweep {name}: {sweep.sweeper} decides on the jobs as it goes, so there is no plan")
            return 0 if asked.dry_run or sweep.plan else None
        planned = plan_jobs(sweep.jobs, lambda overrides: self._find_target((*sweep.search_path, *overrides)))
        refuse_other_outputs(planned, self._outputs)
        self._print_plan(name, planned, sweep)
        refuse_uncomposable(planned)
        if asked.dry_run:
            self._say("sweep.dry_run=true: nothing was done")
            return 0
        if sweep.plan:
            return self._plan_each(planned, sweep)
        now = utc_text(time.time())
        made = SweepRecord(
            name=name,
            typed=sweep.typed,
            options=sweep.options,
            launch=sweep.launch,
            launcher=sweep.launcher,
            created_at=now,
            updated_at=now,
            jobs=tuple(_recorded(job, self._outputs) for job in planned),
        )
        merged = made.merged(load_sweep(path))
        save_sweep(path, merged)
        if all(job.action == "skip" for job in planned):
            self._say("every job is finished; nothing was touched")
            return 0
        self._recorded, self._num_jobs = (path, merged), len(planned)
        os.environ[SWEEP_VARIABLE] = name  # jobs that report on themselves report on the sweep, too
        return None

    def ends(self, codes: Sequence[int]) -> int:
        """Look at the runs, record and print what became of them: 0, 1 if a job failed, 128+N if a signal came."""
        signalled = next((code for code in codes if code in STOPPING), 0)
        if self._recorded is None:
            return signalled or int(any(codes))
        path, record = self._recorded
        record = record.merged(load_sweep(path))  # another sweep of this name may have begun since
        outcomes = outcomes_of(record, self._outputs)
        jobs = tuple(replace(job, state=found.state) for job, found in zip(record.jobs, outcomes, strict=True))
        save_sweep(path, replace(record, updated_at=utc_text(time.time()), jobs=jobs))
        self._end_page(path)
        ours = outcomes[: self._num_jobs]
        print_outcomes(ours, self._print_table, self._say)
        self._say(f"again, or on with it: {resume_command(record.name, self._outputs)}")
        return signalled or int(any(not one.is_well for one in ours) or any(codes))

    def _plan_each(self, planned: Sequence[PlannedJob], sweep: Sweep) -> int:
        """What each job would take, one after the other; the exit code. Here, because a launcher would write files."""
        code = 0
        for number, job in enumerate(planned):
            if job.action in ("new", "continue", "retry") and code not in STOPPING:
                self._say(f"\njob {number}: {' '.join(job.overrides)}")
                code = self._run_job(job.overrides, sweep.options) or code
        return code

    def _end_page(self, path: Path) -> None:
        """Once more where jobs have written it: of several at once, the last one need not have been the latest."""
        page = path.with_name(PAGE)
        process = begin_sweep_page(self._outputs, gently=False) if page.exists() else None
        if process is None:
            return
        try:
            process.wait(_PAGE_SECS)
            self._say(f"page: {page}")
        except subprocess.TimeoutExpired:
            process.kill()

    def _print_plan(self, name: str, planned: Sequence[PlannedJob], sweep: Sweep) -> None:
        paces = Paces(self._outputs)
        secs = [paces.secs_left(job) for job in planned]
        swept = differing([job.overrides for job in planned])
        lines = [
            (str(number), job.run_key or "–", job.action, _about(left), swept[number], first_line(job.reason))
            for number, (job, left) in enumerate(zip(planned, secs, strict=True))
        ]
        self._print_table(("job", "run", "plan", "time", "overrides", "because"), lines)
        counts = Counter(job.action for job in planned)
        total = "unknown" if None in secs else _about(sum(left for left in secs if left is not None))
        what = ", ".join(f"{counts[action]} {action}" for action in ACTIONS if counts[action])
        self._say(f"sweep {name}: {what}; by {sweep.launcher}; one after the other about {total}")


_PACES = """
SELECT group_hash, model, data, secs_per_step / batch, horizon * batch * 1.0 / epochs FROM (
    SELECT *, json_extract(settings, '$."model.name"') AS model, json_extract(settings, '$."data.name"') AS data,
        json_extract(settings, '$."train.batch_size"') AS batch, json_extract(settings, '$."train.epochs"') AS epochs
    FROM runs WHERE secs_per_step IS NOT NULL
) WHERE typeof(batch) = 'integer' AND batch > 0 AND typeof(epochs) = 'integer' AND epochs > 0
"""


class Paces:
    """How fast earlier runs were: of the same settings but for the seed, else of the same model and data set."""

    def __init__(self, outputs: Path) -> None:
        self._known: dict[object, list[tuple[float, float]]] = {}  # seconds an image, images an epoch
        with contextlib.suppress(CatalogueError, OSError):  # an estimate is not worth an error
            view = Catalogue(outputs, say=lambda _: None).view()
            with contextlib.closing(view):
                for group, model, data, secs, images in view.rows(_PACES):
                    for alike in (group, (model, data)):
                        self._known.setdefault(alike, []).append((secs, images))

    def secs_left(self, job: PlannedJob) -> float | None:
        """About how long a job will take; None where nobody knows."""
        if job.target is None or job.action == "skip":
            return 0.0
        config = job.target.config
        batch, alike = config.train.batch_size, (config.model.name, config.data.name)
        found = self._known.get(group_hash(config)) or self._known.get(alike)
        if not found:
            return None
        secs, images = map(statistics.median, zip(*found, strict=True))
        steps = job.num_steps_left(max(round(images / batch), 1))
        return None if steps is None else secs * batch * steps


def print_outcomes(outcomes: Sequence[Outcome], print_table: PrintTable, say: Say) -> None:
    """A line for each job, and for each that failed where its traceback is and the command that tries again."""
    print_table(OUTCOME_COLUMNS, outcome_lines(outcomes))
    for number, one in enumerate(outcomes):
        if not one.is_well:
            if one.traceback is not None:
                say(f"job {number}: traceback in {one.traceback}")
            say(f"job {number} again: {one.command}")


def _recorded(job: PlannedJob, outputs: Path) -> JobRecord:
    if job.target is None:
        return JobRecord(overrides=job.overrides, run_key=None, state=None, problem=job.reason)
    record, paths = job.target.record, job.target.paths
    made = JobRecord(overrides=job.overrides, run_key=job.run_key, state="new" if record is None else record.state)
    usual = made.paths(outputs)
    if usual is not None and usual.directory.resolve() == paths.directory.resolve():
        return made
    return replace(made, directory=str(paths.directory.resolve()))


def _about(secs: float | None) -> str:
    return "unknown" if secs is None else duration_text(secs)
