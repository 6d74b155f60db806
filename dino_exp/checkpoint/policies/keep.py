"""What to keep: rules that each judge all checkpoints, and `plan_retention`, which joins them with a floor.

Everything is a pure function of `CheckpointInfo`s. A plan says for each checkpoint why it stays or goes.
Below any set of rules lies the floor: the newest checkpoint, the newest healthy one, and the newest that is
verified and resumable always stay, so that no choice of settings can leave a run without a state to go on
from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from dino_exp.checkpoint.policies.milestones import Milestone, milestone_steps
from dino_exp.checkpoint.policies.save import MILESTONE
from dino_exp.checkpoint.types import CheckpointInfo, RetentionPlan, Schedule
from dino_exp.errors import ConfigError

_STEP = attrgetter("step")


@dataclass(frozen=True)
class Verdict:
    """One rule's opinion by step: why to keep, and what to say about one that no rule keeps."""

    keep: Mapping[int, str] = field(default_factory=dict)
    otherwise: Mapping[int, str] = field(default_factory=dict)


class KeepRule(Protocol):
    """One reason for which checkpoints are kept. A rule never drops: what no rule keeps is dropped."""

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """Judge `infos`, which ascend by step."""


def _check_count(value: int, setting: str) -> None:
    if value < 0:
        raise ConfigError(f"checkpoint.keep.{setting} must be at least 0, got {value}")


@dataclass(frozen=True)
class LatestN:
    """The `num` newest by step (never by a clock)."""

    num: int

    def __post_init__(self) -> None:
        _check_count(self.num, "last")

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """See `KeepRule`."""
        first_kept = max(len(infos) - self.num, 0)
        steps = [info.step for info in infos]
        why = "all are kept" if self.num >= sys.maxsize else f"last {self.num}"
        otherwise = dict.fromkeys(steps[:first_kept], f"older than last {self.num}") if self.num else {}
        return Verdict(dict.fromkeys(steps[first_kept:], why), otherwise)


@dataclass(frozen=True)
class BestN:
    """The `num` best by one metric. `mode` is "max" or "min". Of equals the earlier step is better.

    NaN, infinite and missing metrics, collapsed models and states without the metric never rank. With `num`
    0 the rule only says what "best" means.
    """

    metric: str
    mode: str = "max"
    num: int = 1

    def __post_init__(self) -> None:
        _check_count(self.num, "best")
        if self.mode not in ("max", "min"):
            raise ConfigError(f'checkpoint.keep.mode must be "max" or "min", got {self.mode!r}')

    def rank(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """The ones that rank, best first."""
        return self._best_first(info for info in sorted(infos, key=_STEP) if self._unranked_because(info) is None)

    def _best_first(self, ascending: Iterable[CheckpointInfo]) -> list[CheckpointInfo]:
        """Sorting is stable: of equals the earlier stays first."""
        metric, sign = self.metric, -1.0 if self.mode == "max" else 1.0
        return sorted(ascending, key=lambda info: sign * info.metrics[metric])

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """See `KeepRule`."""
        if self.num == 0:
            return Verdict()
        unranked = {info.step: why for info in infos if (why := self._unranked_because(info)) is not None}
        ranked = self._best_first(info for info in infos if info.step not in unranked)
        keep = {
            info.step: f"best {self.metric} {info.metrics[self.metric]:.6g} (rank {rank} of {self.num})"
            for rank, info in enumerate(ranked[: self.num], start=1)
        }
        by_metric = f" by {self.metric}"
        otherwise = {info.step: f"rank {rank}{by_metric}" for rank, info in enumerate(ranked, start=1)}
        return Verdict(keep, otherwise | unranked)

    def _unranked_because(self, info: CheckpointInfo) -> str | None:
        if not info.healthy:
            return "collapsed, so never best"
        if self.metric not in info.metrics:
            return f"no {self.metric}"
        value = info.metrics[self.metric]
        return None if math.isfinite(value) else f"{self.metric} is {value}"


@dataclass(frozen=True)
class Milestones:
    """The milestones of the schedule, and whatever was saved as a milestone under an earlier setting."""

    milestones: tuple[Milestone, ...] = ()

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """See `KeepRule`."""
        planned = milestone_steps(self.milestones, schedule)
        labels = {
            info.step: _milestone_labels(info, planned.get(info.step, ()), schedule)
            for info in infos
            if info.reasons or info.step in planned
        }
        return Verdict({step: f"milestone {', '.join(texts)}" for step, texts in labels.items() if texts})


def _milestone_labels(info: CheckpointInfo, planned: tuple[str, ...], schedule: Schedule) -> list[str]:
    """For example `25% of 990 steps`; also what it was saved as when the settings were others."""
    texts = [f"{label} of {schedule.horizon_steps} steps" if "%" in label else label for label in planned]
    saved_as = [reason.removeprefix(MILESTONE) for reason in info.reasons if reason.startswith(MILESTONE)]
    return texts + [f"{label} (when it was saved)" for label in saved_as if label not in planned]


@dataclass(frozen=True)
class Pinned:
    """What somebody pinned."""

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """See `KeepRule`."""
        return Verdict({info.step: "pinned" for info in infos if info.pinned})


@dataclass(frozen=True)
class EveryNEpochs:
    """The end of each `num_epochs`-th epoch."""

    num_epochs: int

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"keep every N epochs: N must be at least 1, got {self.num_epochs}")

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """See `KeepRule`."""
        num_steps = self.num_epochs * schedule.steps_per_epoch
        text = f"every {self.num_epochs} epochs"
        return Verdict({info.step: text for info in infos if info.step % num_steps == 0})


@dataclass(frozen=True)
class ThinMilestones:
    """Of milestones that no other rule keeps, only tensors whose names begin with one of `parts` stay.

    So a milestone is whole as long as it is among the last K, the best, or pinned.
    """

    parts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("checkpoint.keep.thin: of a thinned checkpoint something must stay")

    def judge(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> Verdict:
        """See `KeepRule`: it keeps nothing."""
        return Verdict()

    def plan(self, keepers: Mapping[int, Sequence[KeepRule]], whole: Collection[int]) -> dict[int, tuple[str, ...]]:
        """What stays of which steps. `keepers` are the rules that keep each; `whole` may not be thinned."""
        return {
            step: self.parts
            for step, rules in keepers.items()
            if step not in whole and all(isinstance(rule, Milestones) for rule in rules)
        }


@dataclass(frozen=True)
class KeepAny:
    """The union of several rules: kept if any keeps. The retention policy of a run."""

    rules: tuple[KeepRule, ...]

    def plan(self, infos: Sequence[CheckpointInfo], schedule: Schedule) -> RetentionPlan:
        """See `plan_retention`."""
        return plan_retention(infos, self.rules, schedule)


def plan_retention(infos: Sequence[CheckpointInfo], rules: Sequence[KeepRule], schedule: Schedule) -> RetentionPlan:
    """Which checkpoints stay and which go, with every reason. `infos` in any order, one for each step.

    Idempotent; a further rule never drops more; the floor (see the module) always stays.
    """
    ordered = sorted(infos, key=_STEP)
    verdicts = [rule.judge(ordered, schedule) for rule in rules]
    opinions = [verdict.otherwise for verdict in verdicts if verdict.otherwise]
    wanted, floor = _join_by_step(verdict.keep for verdict in verdicts), _floor(ordered)
    kept = {step: [why] for step, why in floor.items()} | wanted  # the floor speaks where no rule does
    thin = _plan_thinning(ordered, rules, verdicts, floor)
    keeps, drops, reasons = [], [], {}
    for step in map(_STEP, ordered):
        if step in kept:
            keeps.append(step)
            only = f"thin to {', '.join(part.rstrip('.') for part in thin[step])}: " if step in thin else "keep: "
            reasons[step] = only + "; ".join(kept[step])
        else:
            drops.append(step)
            against = dict.fromkeys([opinion[step] for opinion in opinions if step in opinion])  # each said once
            reasons[step] = "drop: " + (", ".join(against) or "no rule keeps it")
    return RetentionPlan(tuple(keeps), tuple(drops), reasons, thin)


def _plan_thinning(
    ordered: Sequence[CheckpointInfo], rules: Sequence[KeepRule], verdicts: Sequence[Verdict], floor: Collection[int]
) -> dict[int, tuple[str, ...]]:
    thinning = next((rule for rule in rules if isinstance(rule, ThinMilestones)), None)
    if thinning is None:
        return {}
    keepers: dict[int, list[KeepRule]] = {}
    for rule, verdict in zip(rules, verdicts, strict=True):
        for step in verdict.keep:
            keepers.setdefault(step, []).append(rule)
    thinned = {info.step for info in ordered if not info.resumable}
    return thinning.plan(keepers, {*floor, *thinned})


def _join_by_step(keeps: Iterable[Mapping[int, str]]) -> dict[int, list[str]]:
    joined: dict[int, list[str]] = {}
    for keep in keeps:
        for step, why in keep.items():
            joined.setdefault(step, []).append(why)
    return joined


def _floor(ordered: Sequence[CheckpointInfo]) -> dict[int, str]:
    if not ordered:
        return {}
    resumable = [info.step for info in ordered if info.resumable]
    verified = [info.step for info in ordered if info.resumable and info.verified]
    healthy = [info.step for info in ordered if info.resumable and info.healthy]
    # Nothing verified: any of them may be the only good one, so all that a run could go on from stay.
    floor = dict.fromkeys(() if verified else resumable, "none is verified yet")
    floor |= dict.fromkeys(healthy[-1:], "the last healthy one")
    floor |= dict.fromkeys(verified[-1:], "the newest that is verified and resumable")
    return floor | {ordered[-1].step: "the newest"}
