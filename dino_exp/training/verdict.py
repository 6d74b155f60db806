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
from dino_exp.training.state import TrainState, Unread


class NonFiniteError(TrainingError):
    """The loss or a gradient is NaN or infinite. The state is that of the last completed step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step


def step_counts(loss: Tensor, norm: Tensor, scaler: LossScaler | None, unread: list[Unread]) -> Tensor:
    """A true or false tensor: whether the step counts, and all before it that the host has not asked about.

    With loss scaling a gradient may overflow: that costs the update of the student and halves the scale.
    """
    counts = loss.isfinite()
    counts = counts & (norm.isfinite() if scaler is None else scaler.scale >= LEAST_SCALE)
    return counts & (unread[-1].report[-1] > 0) if unread else counts


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

    Raises NonFiniteError for the first that does not count; the state is then that of the step before it. While the
    device cannot be read, which raises RuntimeError, they stay unread, and the state may not be saved.
    """
    reports = [unread.report.cpu() for unread in state.unread]  # a device that is full has no room to stack them
    try:
        while state.unread:
            unread, report = state.unread[0], reports.pop(0)
            state.note_loss(require(unread.step, report, state.scaler))
            del state.unread[0]
    except NonFiniteError:
        state.unread.clear()
        state.step = unread.step - 1
        _forget_moments_after(state.optimizer, unread.num_with_moments)
        raise


def _forget_moments_after(optimizer: torch.optim.Optimizer, num_parameters: int) -> None:
    """Those of later parameters than the first so many, in the order in which the optimizer met them."""
    for parameter in list(optimizer.state)[num_parameters:]:
        del optimizer.state[parameter]


def _culprit(loss: float, norm: float, scaler: LossScaler | None) -> str:
    if not math.isfinite(loss):
        return f"the loss ({loss})"
    if scaler is not None:
        return f"the gradient's norm at a loss scale of {float(scaler.scale):g}, the last of many ({norm})"
    return f"the gradient's norm ({norm})"
