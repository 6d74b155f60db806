"""What each job of a sweep will do. Pure, but for looking at the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from dino_exp.attempts.run import start_of
from dino_exp.attempts.target import Target
from dino_exp.errors import DinoExpError, RefusedError

Action: TypeAlias = Literal["new", "continue", "retry", "skip", "wrong"]
FindTarget: TypeAlias = Callable[[Sequence[str]], Target]
ACTIONS: tuple[Action, ...] = ("new", "continue", "retry", "skip", "wrong")


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job and what will happen to it; `directory` and `target` are None for settings that are wrong."""

    overrides: tuple[str, ...]
    action: Action
    reason: str
    target: Target | None = None

    @property
    def directory(self) -> Path | None:
        """Where its run lies, or will."""
        return None if self.target is None else self.target.paths.directory

    @property
    def run_key(self) -> str | None:
        """The key of its run."""
        directory = self.directory
        return None if directory is None else directory.name

    @property
    def num_steps_left(self) -> int | None:
        """Steps until its stop, where its run has begun; None where only its start will tell."""
        if self.action == "skip":
            return 0
        if self.target is None or self.target.record is None:
            return None
        record, train = self.target.record, self.target.config.train
        stops = [record.schedule.horizon_steps]
        stops += [] if train.stop_after_steps is None else [train.stop_after_steps]
        per_epoch = record.schedule.steps_per_epoch
        stops += [] if train.stop_after_epochs is None else [train.stop_after_epochs * per_epoch]
        return max(min(stops) - record.step, 0)


def plan_jobs(jobs: Sequence[Sequence[str]], find_target: FindTarget) -> list[PlannedJob]:
    """The plan, in the order of the jobs. A job whose settings are wrong, or whose run is refused, spoils no other.

    Raises RefusedError where two jobs would work on one run.
    """
    planned = [_planned(tuple(overrides), find_target) for overrides in jobs]
    _refuse_doubles(planned)
    return planned


def _planned(overrides: tuple[str, ...], find_target: FindTarget) -> PlannedJob:
    try:
        target = find_target(overrides)
        start = start_of(target)
    except DinoExpError as problem:
        return PlannedJob(overrides=overrides, action="wrong", reason=str(problem))
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
            raise RefusedError(
                f"{len(jobs)} jobs of this sweep are the same run, {directory.name}:\n  {which}\n"
                "What they differ in does not change the result; give each a `run.variant=<name>`, or take all but one "
                "out"
            )
