"""Milestones: points of a run at which a checkpoint is saved and kept for ever.

"10" is the end of epoch 10; "25%" is a quarter of the horizon, hit exactly once: at the first step that
reaches it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from dino_exp.checkpoint.types import Schedule
from dino_exp.errors import ConfigError

_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)\s*%")
_EPOCH = re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class Milestone:
    """One point: an epoch, or a fraction of the horizon. Exactly one of the two is set."""

    epoch: int | None = None
    fraction: Fraction | None = None

    def __post_init__(self) -> None:
        if (self.epoch is None) == (self.fraction is None):
            raise ConfigError("a milestone is either an epoch or a fraction of the horizon")
        if self.epoch is not None and self.epoch < 1:
            raise ConfigError(f"a milestone's epoch must be at least 1, got {self.epoch}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ConfigError(f"a milestone must be over 0% and at most 100%, got {self.label}")

    @property
    def label(self) -> str:
        """For people: `epoch 10` or `25%`."""
        if self.fraction is None:
            return f"epoch {self.epoch}"
        percent = self.fraction * 100
        return f"{percent.numerator}%" if percent.denominator == 1 else f"{float(percent):.12g}%"

    @property
    def text(self) -> str:
        """What `milestone_from_text` reads back."""
        return str(self.epoch) if self.fraction is None else self.label

    def step(self, schedule: Schedule) -> int:
        """The first step that reaches it; beyond the horizon for an epoch that never comes."""
        if self.fraction is not None:
            return math.ceil(self.fraction * schedule.horizon_steps)  # exact: a Fraction, never a float
        assert self.epoch is not None
        return self.epoch * schedule.steps_per_epoch


def milestone_from_text(text: str | int) -> Milestone:
    """`"25%"` or `"12.5%"`: a fraction of the horizon; `"10"` or `10`: an epoch. Raises ConfigError."""
    given = str(text).strip()
    percent = _PERCENT.fullmatch(given)
    if percent is not None:
        return Milestone(fraction=Fraction(percent[1]) / 100)
    if _EPOCH.fullmatch(given):
        return Milestone(epoch=int(given))
    raise ConfigError(f'checkpoint.keep.milestones: {given!r} is no milestone; write an epoch ("10") or "25%"')


def milestone_steps(milestones: Iterable[Milestone], schedule: Schedule) -> dict[int, tuple[str, ...]]:
    """The labels of the milestones at each step; several may share one step, none is beyond the horizon."""
    found: dict[int, tuple[str, ...]] = {}
    for milestone in milestones:
        step = milestone.step(schedule)
        if step <= schedule.horizon_steps:
            found[step] = (*found.get(step, ()), milestone.label)
    return found
