"""Plain facts that policies and listings work with: numbers in, numbers out. No torch, no files, no clock.

An object that can be saved is torch's own `Stateful`: `state_dict()` gives a flat mapping of dotted names
to tensors and JSON values, `load_state_dict(mapping)` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, TypeAlias, runtime_checkable

from dino_exp.errors import CheckpointError, ConfigError

JSON: TypeAlias = Any  # None, bool, int, float, str, list or dict of these
OnEvent: TypeAlias = Callable[..., None]  # called as on_event(kind, **fields)


class UnsupportedFormatError(CheckpointError):
    """Written by a newer version: not damaged, and not readable here."""

    exit_code = 4


class Stateful(Protocol):
    """What can be saved and restored, under names such as `teacher.norm.weight` or `loader.position`."""

    def state_dict(self) -> Mapping[str, Any]:
        """Flat mapping: a tensor, or a JSON value, under each dotted name."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """Take back what `state_dict` gave: every name, in place. Tensors arrive on the CPU."""


@runtime_checkable
class ShardedStateful(Protocol):
    """A state whose tensors may lie in parts over several processes, and are loaded part by part."""

    def state_dict(self) -> Mapping[str, Any]:
        """As a `Stateful` has it."""

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any:
        """As a `Stateful` has it."""

    def load_parts(
        self, names: Collection[str], values: Mapping[str, JSON], fill: Callable[[Mapping[str, Any]], None], /
    ) -> None:
        """Take over `values`, and the tensors of these names as `fill` puts their parts into those it is given."""


@dataclass(frozen=True)
class Schedule:
    """The length of a run in optimizer steps (the horizon), and of one epoch."""

    horizon_steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        if self.horizon_steps < 1 or self.steps_per_epoch < 1:
            raise ConfigError(
                f"a schedule needs at least 1 step and 1 step an epoch, got {self.horizon_steps} "
                f"and {self.steps_per_epoch}: the data set is smaller than one batch, or train.epochs is 0"
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Facts about one checkpoint that policies see. `metrics` may hold NaN; `created_at` is ISO UTC."""

    step: int
    epoch: int
    created_at: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    healthy: bool = True
    resumable: bool = True
    verified: bool = True
    bytes: int = 0
    pinned: bool = False


@dataclass(frozen=True, kw_only=True)
class SaveContext:
    """What a save policy decides from, after one optimizer step.

    `now_secs` and `last_save_secs` are readings of one clock; before the first save the latter is the time at
    which training began. `last_saved_step` is None before the first save of the run. `secs_left` is the time left
    in the allocation of the machine, negative once that is over; None where nobody knows.
    """

    step: int
    schedule: Schedule
    now_secs: float = 0.0
    last_save_secs: float = 0.0
    last_saved_step: int | None = None
    improved: bool = False
    ending: bool = False
    signal: str | None = None
    secs_left: float | None = None


class SaveProgress(IntEnum):
    """How far the last save has come. `ENDED`: how it went is still to be heard."""

    NONE = 0
    UNDER_WAY = 1
    ENDED = 2


class Committed(Protocol):
    """What is told of a checkpoint that was committed."""

    @property
    def step(self) -> int:
        """The step."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it was saved."""


@dataclass(frozen=True)
class RetentionPlan:
    """Which steps stay and which go, ascending, and why: a reason for each step.

    `thin` are those of `keep` of which only a part stays, with the beginnings of the names of the tensors in it.
    """

    keep: tuple[int, ...]
    drop: tuple[int, ...]
    reasons: Mapping[int, str]
    thin: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
