"""How many checkpoints a training will make and keep, before it begins. Bounds from above; nothing is simulated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dino_exp.checkpoint.policies.keep import BestN, EveryNEpochs, KeepAny, LatestN, Milestones, ThinMilestones
from dino_exp.checkpoint.policies.milestones import Milestone, milestone_steps
from dino_exp.checkpoint.policies.save import (
    AnyOf,
    AtEnd,
    AtMilestones,
    EveryEpochs,
    EveryMinutes,
    EverySteps,
    OnImprovement,
)
from dino_exp.checkpoint.types import Schedule


@dataclass(frozen=True)
class Span:
    """The steps that are still to come: after `start` until and with `stop`, and those of them with an evaluation."""

    start: int
    stop: int
    schedule: Schedule
    evaluations: tuple[int, ...] = ()

    def multiples(self, num_steps: int) -> range:
        """Those at a multiple of `num_steps`."""
        return range((self.start // num_steps + 1) * num_steps, self.stop + 1, num_steps)

    def among(self, milestones: Iterable[Milestone]) -> set[int]:
        """Those at which a milestone lies."""
        return {step for step in milestone_steps(milestones, self.schedule) if self.start < step <= self.stop}


@dataclass(frozen=True)
class Kept:
    """How many are kept at most when all is done: whole ones, and those of which only a part stays."""

    whole: int
    thin: int = 0


def num_saves(policy: AnyOf, span: Span, secs_per_step: float | None) -> int:
    """Saves at most: each evaluation may be an improvement; signals and deadlines are not foreseen.

    Saves by the clock count by `secs_per_step`; None: they are left out.
    """
    steps: set[int] = set()
    by_clock = 0
    per_epoch = span.schedule.steps_per_epoch
    for one in policy.policies:
        match one:
            case EveryEpochs(num_epochs):
                steps.update(span.multiples(num_epochs * per_epoch))
            case EverySteps(num_steps):
                steps.update(span.multiples(num_steps))
            case EveryMinutes(num_minutes) if secs_per_step is not None:
                by_clock += int((span.stop - span.start) * secs_per_step / (60 * num_minutes))
            case OnImprovement():
                steps.update(span.evaluations)
            case AtMilestones(milestones):
                steps.update(span.among(milestones))
            case AtEnd() if span.stop > span.start:
                steps.add(span.stop)
    return min(len(steps) + by_clock, span.stop - span.start)


def most_kept(policy: KeepAny, span: Span, saves: int, present: int = 0) -> Kept:
    """How many of `saves` new checkpoints, and of the `present` ones, the rules keep at most.

    What is pinned comes on top. The floor is in it: the last healthy one stays where the newest are not.
    """
    whole = thin = 0
    thins = any(isinstance(rule, ThinMilestones) for rule in policy.rules)
    for rule in policy.rules:
        match rule:
            case LatestN(num):
                whole += min(num, saves + present)
            case BestN(_, _, num):
                whole += num
            case EveryNEpochs(num_epochs):
                whole += len(span.multiples(num_epochs * span.schedule.steps_per_epoch))
            case Milestones(milestones) if thins:
                thin += len(span.among(milestones))
            case Milestones(milestones):
                whole += len(span.among(milestones))
    whole = min(whole + 1, saves + present)
    return Kept(whole, min(thin, saves + present - whole))
