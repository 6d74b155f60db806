"""When the loop logs, evaluates and stops: numbers in, decisions out.

Rows and evaluations depend on the horizon, never on where this attempt stops, so that a run stopped and continued
writes the same rows as one that ran through.
"""

from __future__ import annotations

from dataclasses import dataclass

from dino_exp.checkpoint.types import Schedule


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The calendar of a run, in steps. `stop_step` is absolute and at most `horizon_steps`."""

    steps_per_epoch: int
    horizon_steps: int
    stop_step: int
    log_every_steps: int
    evaluate_every_epochs: int | None
    batch_size: int
    warmup_steps: int
    metric: str
    mode: str
    on_collapse: str

    @property
    def schedule(self) -> Schedule:
        """The horizon and the length of an epoch, as checkpoint policies know them."""
        return Schedule(self.horizon_steps, self.steps_per_epoch)

    def is_evaluation_due(self, step: int) -> bool:
        """At every N-th epoch's end and at the horizon; never when evaluation is off."""
        if self.evaluate_every_epochs is None:
            return False
        return step % (self.evaluate_every_epochs * self.steps_per_epoch) == 0 or step == self.horizon_steps

    def is_row_due(self, step: int) -> bool:
        """At every N-th step, at the horizon, and wherever an evaluation is due."""
        return step % self.log_every_steps == 0 or step == self.horizon_steps or self.is_evaluation_due(step)

    def epoch_of(self, step: int) -> float:
        """Epochs done after `step` steps, rounded to six digits."""
        return round(step / self.steps_per_epoch, 6)

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether `value` beats `best` under the configured mode; NaN beats nothing."""
        if value != value:
            return False
        if best is None:
            return True
        return value > best if self.mode == "max" else value < best


def plan_stop(
    *, horizon_steps: int, steps_per_epoch: int, stop_after_steps: int | None, stop_after_epochs: int | None
) -> int:
    """The absolute step at which this attempt ends."""
    stops = [horizon_steps]
    if stop_after_steps is not None:
        stops.append(stop_after_steps)
    if stop_after_epochs is not None:
        stops.append(stop_after_epochs * steps_per_epoch)
    return min(stops)
