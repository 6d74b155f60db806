"""When to save: pure functions of a `SaveContext`. Each policy answers with its reasons; none means no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from dino_exp.checkpoint.policies.milestones import Milestone, milestone_steps
from dino_exp.checkpoint.types import SaveContext
from dino_exp.errors import ConfigError

Reasons = tuple[str, ...]

IMPROVED = "improved"
END = "end"
MILESTONE = "milestone "  # followed by the label, for example "milestone 25%"
SIGNAL = "signal "  # followed by the signal's name
EMERGENCY = "emergency"  # an exception is about to end the attempt; the caller's reason


class SavePolicy(Protocol):
    """Decides after each step whether to save."""

    def should_save(self, context: SaveContext) -> Reasons:
        """Why to save now; empty: do not."""


def _check_positive(value: float, setting: str) -> None:
    if not value > 0:
        raise ConfigError(f"checkpoint.save.{setting} must be over 0, got {value}; write null to switch it off")


@dataclass(frozen=True)
class EverySteps:
    """At each multiple of `num_steps`."""

    num_steps: int

    def __post_init__(self) -> None:
        _check_positive(self.num_steps, "every_steps")

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        return (f"every {self.num_steps} steps",) if context.step % self.num_steps == 0 else ()


@dataclass(frozen=True)
class EveryEpochs:
    """At the end of each `num_epochs`-th epoch."""

    num_epochs: int

    def __post_init__(self) -> None:
        _check_positive(self.num_epochs, "every_epochs")

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        num_steps = self.num_epochs * context.schedule.steps_per_epoch
        return () if context.step % num_steps else (f"epoch {context.step // context.schedule.steps_per_epoch}",)


@dataclass(frozen=True)
class EveryMinutes:
    """When `num_minutes` have passed since the last save, or the clock was set back behind it."""

    num_minutes: float

    def __post_init__(self) -> None:
        _check_positive(self.num_minutes, "every_minutes")

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        passed_secs = context.now_secs - context.last_save_secs
        waiting = 0 <= passed_secs < 60 * self.num_minutes
        return () if waiting else (f"every {self.num_minutes:g} minutes",)


@dataclass(frozen=True)
class OnImprovement:
    """When the caller's metric improved since the last save."""

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        return (IMPROVED,) if context.improved else ()


@dataclass(frozen=True)
class AtMilestones:
    """At each milestone's step."""

    milestones: tuple[Milestone, ...]

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        labels = milestone_steps(self.milestones, context.schedule).get(context.step, ())
        return tuple(MILESTONE + label for label in labels)


@dataclass(frozen=True)
class AtEnd:
    """When training ends here: the horizon, or a stop before it."""

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        return (END,) if context.ending or context.step == context.schedule.horizon_steps else ()


@dataclass(frozen=True)
class OnSignal:
    """When a signal asks for it."""

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        return () if context.signal is None else (SIGNAL + context.signal,)


@dataclass(frozen=True)
class AnyOf:
    """When any of several policies says so.

    Two reasons at one step make one save; a saved step is not due again.
    """

    policies: tuple[SavePolicy, ...]

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        if context.step == context.last_saved_step:
            return ()
        return tuple(reason for policy in self.policies for reason in policy.should_save(context))
