"""What each job of a sweep will do. Pure, but for looking at the runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from dino_exp.attempts.run import start_of
from dino_exp.attempts.target import RUN_DIR_VARIABLE, Target
from dino_exp.errors import CompositionError, ConfigError, DinoExpError, RefusedError, of_os
from dino_exp.training.plan import plan_stop
from dino_exp.words import count_text

Action: TypeAlias = Literal["new", "continue", "retry", "skip", "wrong"]
FindTarget: TypeAlias = Callable[[Sequence[str]], Target]
ACTIONS: tuple[Action, ...] = ("new", "continue", "retry", "skip", "wrong")


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job and what will happen to it; `directory` and `target` are None for settings that are wrong.

    `composes`: whether Hydra can make a configuration of its overrides, be it right or wrong.
    """

    overrides: tuple[str, ...]
    action: Action
    reason: str
    target: Target | None = None
    composes: bool = True

    @property
    def directory(self) -> Path | None:
        """Where its run lies, or will."""
        return None if self.target is None else self.target.paths.directory

    @property
    def run_key(self) -> str | None:
        """The key of its run."""
        directory = self.directory
        return None if directory is None else directory.name

    def num_steps_left(self, steps_per_epoch: int | None = None) -> int | None:
        """Steps until its stop. `steps_per_epoch` counts where its run has not begun; None where that is not known."""
        if self.action in ("skip", "wrong") or self.target is None:
            return 0
        record, train, parent = self.target.record, self.target.config.train, self.target.parent
        if record is not None:
            horizon, steps_per_epoch, step = record.schedule.horizon_steps, record.schedule.steps_per_epoch, record.step
        elif steps_per_epoch is not None:
            horizon, step = train.epochs * steps_per_epoch, 0 if parent is None else int(parent["step"])
        else:
            return None
        stop = plan_stop(
            horizon_steps=horizon,
            steps_per_epoch=steps_per_epoch,
            stop_after_steps=train.stop_after_steps,
            stop_after_epochs=train.stop_after_epochs,
        )
        return max(stop - step, 0)


def plan_jobs(jobs: Sequence[Sequence[str]], find_target: FindTarget) -> list[PlannedJob]:
    """The plan, in the order of the jobs. A job whose settings are wrong, or whose run is refused, spoils no other.

    Raises RefusedError where two jobs would work on one run.
    """
    planned = [_planned(tuple(overrides), find_target) for overrides in jobs]
    _refuse_doubles(planned)
    return planned


def refuse_uncomposable(planned: Sequence[PlannedJob]) -> None:
    """Raises CompositionError for jobs that Hydra cannot compose: it composes all, and would begin none."""
    lines = [f"job {number}: {job.reason}" for number, job in enumerate(planned) if not job.composes]
    if lines:
        raise CompositionError(
            f"{len(lines)} of {count_text(len(planned), 'job')} cannot be composed, and Hydra composes all before the "
            "first begins:\n  " + "\n  ".join(lines) + "\nNothing was begun or written. Correct them, or take them out"
        )


def refuse_other_outputs(planned: Sequence[PlannedJob], outputs: Path) -> None:
    """Raises ConfigError for a job elsewhere: a sweep lies in one folder with its runs, and is resumed there."""
    for number, job in enumerate(planned):
        resumes = any(word.lstrip("+").startswith("resume=") for word in job.overrides)  # that run lies where it lies
        there = outputs if job.target is None or resumes else Path(job.target.config.paths.outputs)
        if there != outputs:
            raise ConfigError(
                f"paths.outputs: found {there} for job {number} and {outputs} for the sweep, expected one folder for "
                "all of it. Type a sweep for each folder, or sweep `run.variant` to tell runs apart"
            )


def _planned(overrides: tuple[str, ...], find_target: FindTarget) -> PlannedJob:
    try:
        target = find_target(overrides)
        start = start_of(target)
    except (DinoExpError, OSError) as problem:
        reason = str(of_os(problem) if isinstance(problem, OSError) else problem)
        composes = not isinstance(problem, CompositionError)
        return PlannedJob(overrides=overrides, action="wrong", reason=reason, composes=composes)
    if start.kind == "new":
        return PlannedJob(overrides=overrides, action="new", reason=start.reason, target=target)
    if start.kind == "continue":
        failed = target.record is not None and target.record.state == "failed"
        action: Action = "retry" if failed else "continue"
        return PlannedJob(overrides=overrides, action=action, reason=start.reason, target=target)
    return PlannedJob(overrides=overrides, action="skip", reason=start.reason, target=target)


def _refuse_doubles(planned: Sequence[PlannedJob]) -> None:
    by_run: dict[Path, list[PlannedJob]] = {}
    for job in planned:
        if job.directory is not None:
            by_run.setdefault(job.directory, []).append(job)
    for directory, jobs in by_run.items():
        if len(jobs) > 1:
            which = "\n  ".join(" ".join(job.overrides) for job in jobs)
            why = (
                f"{RUN_DIR_VARIABLE} gives each of them this directory; unset it"
                if os.environ.get(RUN_DIR_VARIABLE)
                else "What they differ in does not change the result; give each a `run.variant=<name>`, or take all "
                "but one out"
            )
            raise RefusedError(f"{len(jobs)} jobs of this sweep are the same run, {directory.name}:\n  {which}\n{why}")
