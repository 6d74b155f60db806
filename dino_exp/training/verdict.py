"""Whether a step counts: known on the device at once, and on the host later, so that it need not wait at every step.

A step whose loss or gradients are not finite changes nothing, nor does any step after it: the device sees to that. The
host asks before anything depends on it: a row, a save, the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dino_exp.dino.scaling import LEAST_SCALE, LossScaler
from dino_exp.errors import TrainingError
from dino_exp.training.state import TrainState


class NonFiniteError(TrainingError):
    """The loss or a gradient is NaN or infinite. The state is that of the last completed step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step


def step_counts(loss: Tensor, norm: Tensor, scaler: LossScaler | None, unread: list[tuple[int, Tensor]]) -> Tensor:
    """A true or false tensor: whether the step counts, and all before it that the host has not asked about.

    With loss scaling a gradient may overflow: that costs the update of the student and halves the scale.
    """
    counts = loss.isfinite()
    counts = counts & (norm.isfinite() if scaler is None else scaler.scale >= LEAST_SCALE)
    return counts & (unread[-1][1][-1] > 0) if unread else counts


def report_of(loss: Tensor, norm: Tensor, counts: Tensor) -> Tensor:
    """What the host has to ask about a step, in one tensor."""
    return torch.stack([loss.detach().double(), norm.double(), counts.double()])


def require(step: int, report: Tensor, scaler: LossScaler | None) -> float:
    """The loss of a step; the host waits for it. Raises NonFiniteError where the step does not count."""
    loss, norm, counts = report.tolist()
    if not counts:
        raise NonFiniteError(step, _culprit(loss, norm, scaler))
    return float(loss)


def settle(state: TrainState) -> None:
    """Ask the device about the steps that the host does not know of, and note their losses.

    Raises NonFiniteError for the first that does not count; the state is then that of the step before it.
    """
    if not state.unread:
        return
    unread, state.unread = state.unread, []
    reports = torch.stack([report for _, report in unread]).cpu()
    for (step, _), report in zip(unread, reports, strict=True):
        try:
            state.note_loss(require(step, report, state.scaler))
        except NonFiniteError:
            state.step = step - 1
            _forget_unmoved_moments(state.optimizer)
            raise


def _forget_unmoved_moments(optimizer: torch.optim.Optimizer) -> None:
    """Those that a step which does not count has made, all zero."""
    for parameter in [parameter for parameter, moments in optimizer.state.items() if moments.get("step") == 0]:
        del optimizer.state[parameter]


def _culprit(loss: float, norm: float, scaler: LossScaler | None) -> str:
    if not math.isfinite(loss):
        return f"the loss ({loss})"
    if scaler is not None:
        return f"the gradient's norm at a loss scale of {float(scaler.scale):g}, the last of many ({norm})"
    return f"the gradient's norm ({norm})"
