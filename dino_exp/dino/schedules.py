"""Learning rate, weight decay, teacher momentum and temperature: each a pure function of the step.

The step is the number of optimizer steps completed, so `lr_at(0)` is for the first one. The values are those
of the official tables: a linear warm-up from 0 that reaches the base value at its last step, then a cosine
that starts at the base value again and stops one step short of its final value. Temperatures change from
epoch to epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dino_exp.errors import ConfigError

ScheduleName = Literal["cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """The schedules of one training of `num_epochs * steps_per_epoch` steps (the horizon).

    `lr` is the peak, absolute. `constant` keeps learning rate, weight decay and momentum at their base
    values; both warm-ups, of learning rate and of temperature, apply all the same.
    Raises ConfigError for an unknown name, an empty training, or a warm-up longer than the training.
    """

    name: ScheduleName
    num_epochs: int
    steps_per_epoch: int
    lr: float
    min_lr: float
    warmup_epochs: int
    weight_decay: float
    weight_decay_end: float
    teacher_momentum: float
    teacher_momentum_end: float
    teacher_temp: float
    warmup_teacher_temp: float
    warmup_teacher_temp_epochs: int
    freeze_last_layer_epochs: int

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ConfigError(f"scheduler.name must be one of {get_args(ScheduleName)}, got {self.name!r}")
        if self.num_epochs < 1 or self.steps_per_epoch < 1:
            raise ConfigError(
                f"train.epochs and the steps of an epoch must be >= 1, got {self.num_epochs} and {self.steps_per_epoch}"
            )
        for key, epochs in (
            ("scheduler.warmup_epochs", self.warmup_epochs),
            ("loss.warmup_teacher_temp_epochs", self.warmup_teacher_temp_epochs),
        ):
            if not 0 <= epochs <= self.num_epochs:
                raise ConfigError(f"{key} must be from 0 to train.epochs={self.num_epochs}, got {epochs}")

    @property
    def num_steps(self) -> int:
        """The horizon in steps."""
        return self.num_epochs * self.steps_per_epoch

    def lr_at(self, step: int) -> float:
        """Learning rate of all parameters."""
        num_warmup = self.warmup_epochs * self.steps_per_epoch
        if step < num_warmup:
            return _linear(0.0, self.lr, step, num_warmup)
        return self._annealed(self.lr, self.min_lr, step - num_warmup, self.num_steps - num_warmup)

    def weight_decay_at(self, step: int) -> float:
        """Weight decay of the parameters that decay at all."""
        return self._annealed(self.weight_decay, self.weight_decay_end, step, self.num_steps)

    def teacher_momentum_at(self, step: int) -> float:
        """Weight of the old teacher in its moving average."""
        return self._annealed(self.teacher_momentum, self.teacher_momentum_end, step, self.num_steps)

    def teacher_temp_at(self, step: int) -> float:
        """Temperature of the teacher's softmax, the same for all steps of an epoch."""
        epoch, num_warmup = step // self.steps_per_epoch, self.warmup_teacher_temp_epochs
        if epoch < num_warmup:
            return _linear(self.warmup_teacher_temp, self.teacher_temp, epoch, num_warmup)
        return self.teacher_temp

    def last_layer_frozen_at(self, step: int) -> bool:
        """Whether the prototypes keep still."""
        return step < self.freeze_last_layer_epochs * self.steps_per_epoch

    def _annealed(self, start: float, end: float, index: int, length: int) -> float:
        """Value `index` of a half cosine of `length` values from `start` towards `end`."""
        if not 0 <= index < length:
            raise ValueError(f"step {index} of a schedule of {length} steps")
        if self.name == "constant":
            return start
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * index / length))


def _linear(start: float, end: float, index: int, length: int) -> float:
    """Value `index` of `length` evenly spaced values from `start` to `end`, both included."""
    return start + (end - start) * index / (length - 1) if length > 1 else start
