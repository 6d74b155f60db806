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
DEADLINE = "deadline "  # followed by how far it is, for example "deadline in 118 s"
EMERGENCY = "emergency"  # an exception is about to end the attempt; the caller's reason
INTERVAL = "every "  # followed by the interval of steps or minutes, for example "every 10 minutes"


class SavePolicy(Protocol):
    """Decides after each step whether to save."""

    def should_save(self, context: SaveContext) -> Reasons:
        """Why to save now, in short texts; empty: do not.

        A reason that begins with `INTERVAL` says that a later step would do as well (see `may_skip`).
        """


def may_skip(reasons: Reasons) -> bool:
    """Whether a save for these reasons may be left out while another one is still being written.

    Only where every reason is an interval of steps or minutes, which comes again by itself. A milestone, an epoch,
    an improvement, the end or a signal belongs to this very step; such a save waits, and so does any unknown one.
    """
    return bool(reasons) and all(reason.startswith(INTERVAL) for reason in reasons)


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
        return (f"{INTERVAL}{self.num_steps} steps",) if context.step % self.num_steps == 0 else ()


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
        return () if waiting else (f"{INTERVAL}{self.num_minutes:g} minutes",)


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
class BeforeDeadline:
    """Once, when `before_secs` or less are left of the time that the machine was lent for.

    Any save since that window began serves as well: a later one would gain less than `before_secs` of work. What a
    resumed training began with is saved already, so its start counts as a save; a new run's start does not.
    """

    before_secs: float

    def __post_init__(self) -> None:
        _check_positive(self.before_secs, "before_secs")

    def should_save(self, context: SaveContext) -> Reasons:
        """See `SavePolicy`."""
        left_secs = context.secs_left
        if left_secs is None or left_secs > self.before_secs:
            return ()
        window_secs = self.before_secs - left_secs  # how long ago the window began
        since_save_secs = context.now_secs - context.last_save_secs
        if context.last_saved_step is not None and 0 <= since_save_secs <= window_secs:  # below 0: a clock set back
            return ()
        return (f"{DEADLINE}in {max(left_secs, 0):.0f} s",)


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
