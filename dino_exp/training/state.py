"""Everything that a resume needs, in one object.

Only `train_step` and the loop change a `TrainState`. Its `state_dict` is flat: tensors under `student.`, `teacher.`,
`optimizer.` and `loss.`, followed by the official key names, and a handful of JSON values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dino_exp.checkpoint.torch_state import load_moments, optimizer_moments
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.dino.scaling import LossScaler
from dino_exp.errors import CheckpointError, CorruptCheckpointError

JSON_FIELDS = ("step", "loss_sum", "loss_count", "best", "pending_row", "collapse_rows", "healthy")


@dataclass(frozen=True)
class Best:
    """The best evaluation so far: the step that reached it, the metric's name and its value."""

    step: int
    metric: str
    value: float


class Unread(NamedTuple):
    """A step whose verdict still lies on the device; `num_with_moments` parameters had optimizer state before it."""

    step: int
    report: Tensor
    num_with_moments: int


@dataclass(eq=False)
class TrainState:
    """The resumable state after `step` completed optimizer steps.

    `center_1K` is the running mean of the teacher's logits. `loss_sum` and `loss_count` gather the losses since the
    last metrics row. `pending_row` is a row whose evaluation is still due, because a signal came first.
    `scaler` is there for float16 only. `torn` is true only while an update is being applied: a state that is torn must
    not be saved. `unread`: steps whose verdict still lies on the device (see `training.verdict`).
    """

    student: MultiCropModel
    teacher: MultiCropModel
    optimizer: torch.optim.Optimizer
    center_1K: Tensor
    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: Best | None = None
    pending_row: dict[str, Any] | None = None
    collapse_rows: int = 0
    healthy: bool = True
    scaler: LossScaler | None = None
    torn: bool = field(default=False, init=False)
    unread: list[Unread] = field(default_factory=list, init=False)

    def begin_as_fork(self, metric: str, metrics: Mapping[str, float]) -> None:
        """After another run's state was loaded: other settings get the full patience of the alarm.

        The best evaluation of that run may be of a step that this one has not. So the best here is this very state, by
        `metric`, where what was measured of it (`metrics`) says so; else there is none yet.
        """
        self.collapse_rows, self.healthy = 0, True
        value = metrics.get(metric, math.nan)
        self.best = Best(step=self.step, metric=metric, value=value) if math.isfinite(value) else None

    def state_dict(self) -> dict[str, Any]:
        """The flat state: names to tensors (live, not copied) and to JSON values."""
        flat: dict[str, Any] = {}
        flat |= {f"student.{name}": value for name, value in self.student.state_dict().items()}
        flat |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        flat |= {
            f"optimizer.{name}": value
            for name, value in optimizer_moments(self.optimizer, dict(self.student.named_parameters())).items()
        }
        flat["loss.center"] = self.center_1K
        flat |= {} if self.scaler is None else {f"loss.{name}": value for name, value in self.scaler.state().items()}
        for name in JSON_FIELDS:
            flat[name] = getattr(self, name)
        flat["best"] = None if self.best is None else vars(self.best).copy()
        return flat

    def load_state_dict(self, flat: Mapping[str, Any]) -> None:
        """Take over a saved state, strictly, one tensor at a time (a mapping may read each from the disk).

        Raises CheckpointError where a name is missing or unexpected, CorruptCheckpointError where a value is not of
        its kind, and then nothing has changed; CheckpointError where a shape or dtype differs, which leaves it torn.
        """
        self._check(flat.keys(), flat)
        self.torn = True  # until every tensor is in place
        for name, live in self.state_dict().items():
            if isinstance(live, Tensor) and not name.startswith("optimizer."):
                _copy_into(name, live, flat[name])
        moments = {name.removeprefix("optimizer."): flat[name] for name in flat if name.startswith("optimizer.")}
        load_moments(self.optimizer, dict(self.student.named_parameters()), moments)
        self._take_values(flat)

    def load_parts(
        self, names: Collection[str], values: Mapping[str, Any], fill: Callable[[Mapping[str, Tensor]], None]
    ) -> None:
        """Take over a saved state of which this process holds parts: `fill` puts them into the tensors it is given.

        Raises as `load_state_dict`, and what `fill` raises, which leaves the state torn.
        """
        self._check({*names, *values}, values)
        parameters = dict(self.student.named_parameters())
        moments = {name: _empty_moment(name, parameters) for name in names if name.startswith("optimizer.")}
        live = {name: value for name, value in self.state_dict().items() if isinstance(value, Tensor)}
        self.torn = True
        fill({name: value for name, value in live.items() if not name.startswith("optimizer.")} | moments)
        load_moments(self.optimizer, parameters, {name.removeprefix("optimizer."): moments[name] for name in moments})
        self._take_values(values)

    def _check(self, names: Collection[str], values: Mapping[str, Any]) -> None:
        expected = {name for name in self.state_dict() if not name.startswith("optimizer.")}
        given = {name for name in names if not name.startswith("optimizer.")}
        if expected != given:
            raise CheckpointError(
                f"the checkpoint's names are not this model's: missing {_some(expected - given)}, "
                f"unexpected {_some(given - expected)}; was it written with another model?"
            )
        for name in JSON_FIELDS:
            if not _KINDS[name](values[name]):
                raise CorruptCheckpointError(f"{name} is {str(values[name])[:60]!r}, which no training has saved")

    def _take_values(self, values: Mapping[str, Any]) -> None:
        for name in JSON_FIELDS:
            setattr(self, name, values[name])
        self.best = None if values["best"] is None else Best(**values["best"])
        self.torn = False

    def changed_by_update(self) -> set[str]:
        """The names of those tensors of `state_dict` that only the update at the end of a step changes.

        Batch-norm statistics move in the forward pass, and are not among them.
        """
        models = {"student": self.student, "teacher": self.teacher}
        names = {f"{part}.{name}" for part, model in models.items() for name, _ in model.named_parameters()}
        moments = optimizer_moments(self.optimizer, dict(self.student.named_parameters()))
        scaling = () if self.scaler is None else (f"loss.{name}" for name in self.scaler.state())
        return names | {f"optimizer.{name}" for name in moments} | {"loss.center", *scaling}

    def note_loss(self, loss: float) -> None:
        """Add one step's loss to the mean of the next metrics row."""
        self.loss_sum += loss
        self.loss_count += 1

    def take_mean_loss(self) -> float:
        """Mean loss since the last call, which starts a new mean. NaN when there was no step."""
        mean = self.loss_sum / self.loss_count if self.loss_count else math.nan
        self.loss_sum, self.loss_count = 0.0, 0
        return mean


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_best(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() == Best.__dataclass_fields__.keys()
        and _is_count(value["step"])
        and isinstance(value["metric"], str)
        and _is_number(value["value"])
    )


def _is_row(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and _is_count(value.get("step")))


# A manifest may come from a stranger: what would only fail many steps later is refused before the state is touched.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "loss_sum": _is_number,
    "loss_count": _is_count,
    "best": _is_best,
    "pending_row": _is_row,
    "collapse_rows": _is_count,
    "healthy": lambda value: type(value) is bool,
}


def _empty_moment(name: str, parameters: Mapping[str, Tensor]) -> Tensor:
    """Where a saved moment goes: cut into shares as its parameter is. Raises CheckpointError."""
    parameter_name, _, moment = name.removeprefix("optimizer.").rpartition(".")
    parameter = parameters.get(parameter_name)
    if parameter is None:
        raise CheckpointError(
            f"{name}: the model has no such parameter; was the checkpoint written with another model?"
        )
    if moment == "step":  # the same for all of a parameter
        return torch.zeros((), dtype=torch.float32)
    return torch.zeros_like(parameter, requires_grad=False)


@torch.no_grad()
def _copy_into(name: str, live: Tensor, saved: Tensor) -> None:
    if saved.shape != live.shape or saved.dtype != live.dtype:
        raise CheckpointError(
            f"{name}: the checkpoint holds {saved.dtype} {tuple(saved.shape)}, the model {live.dtype} "
            f"{tuple(live.shape)}; was it written with another model?"
        )
    live.copy_(saved)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return f"{', '.join(shown) or 'none'}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
