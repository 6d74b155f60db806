"""One optimisation step of DINO as a transaction (Caron et al. 2021; in the order of the official code).

Several ranks carry out a step together, each on its share of the images (`Parallel`).

Shapes: B images, V crops an image (two global first), K prototypes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_exp.data.images import Images
from dino_exp.data.loader import Batch
from dino_exp.dino.drop_path import drop_scales
from dino_exp.dino.health import Health, Outputs, measure_health
from dino_exp.dino.loss import dino_loss, logit_sum, moved_center
from dino_exp.dino.optim import clip_per_parameter_, ema_update_, freeze_last_layer_, set_hyper
from dino_exp.dino.schedules import Schedules
from dino_exp.errors import TrainingError
from dino_exp.training.parallel import ALONE, Parallel, local_part
from dino_exp.training.phases import phase
from dino_exp.training.state import TrainState

NUM_GLOBAL = 2

Augment = Callable[[Images, Tensor, int], list[Tensor]]


class NonFiniteError(TrainingError):
    """The loss or a gradient is NaN or infinite. The state is that of the last completed step."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"step {step}: {what} is not finite")
        self.step = step


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """The constants of a step: the global batch, temperatures, momenta, drop-path, clipping and precision.

    `accumulate`: in how many parts each rank takes its share of the batch, one after the other.
    """

    seed: int
    batch_size: int
    accumulate: int = 1
    student_temp: float
    center_momentum: float
    drop_path_rate: float
    depth: int
    clip_grad: float | None
    precision: str

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of forward passes: bfloat16 autocast, or nothing for fp32."""
        if self.precision == "bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured. `health` and the norms are there only at logging steps."""

    loss: float
    grad_norm: float
    grad_norm_head: float
    health: Health | None
    update_ratio: float | None


@dataclass
class _Gradients:
    loss: float
    center_1K: Tensor
    norm: float
    head_norm: float
    health: Health | None


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    augment: Augment,
    schedules: Schedules,
    rule: StepRule,
    want_health: bool = False,
    before_update: Callable[[], None] | None = None,
    parallel: Parallel = ALONE,
) -> StepMetrics:
    """Carry the state from `batch.step - 1` to `batch.step`. `batch` is this rank's share.

    Nothing of the state changes before the loss and every gradient are known to be finite: batch-norm statistics
    that the forward pass moved are put back when anything raises. While the update itself is applied, `state.torn`
    is true. `before_update` is called when everything is computed and nothing is changed yet (a save under way may
    still copy the parameters from the device).

    Raises NonFiniteError, and whatever the model or the augmentation raises.
    """
    with _buffers_put_back_on_error(state.student, state.teacher):
        gradients = _compute(state, batch, augment, schedules, rule, want_health, parallel)
        if not math.isfinite(gradients.loss):
            raise NonFiniteError(batch.step, f"the loss ({gradients.loss})")
        if not math.isfinite(gradients.norm):
            raise NonFiniteError(batch.step, f"the gradient's norm ({gradients.norm})")
        before = [local_part(parameter).clone() for parameter in state.student.parameters()] if want_health else None
    if before_update is not None:
        before_update()
    state.torn = True
    _apply(state, batch.step, gradients.center_1K, schedules, rule)
    state.note_loss(gradients.loss)
    state.step = batch.step
    ratio = None if before is None else _update_ratio(before, list(state.student.parameters()), parallel)
    state.torn = False
    return StepMetrics(gradients.loss, gradients.norm, gradients.head_norm, gradients.health, ratio)


def _compute(
    state: TrainState,
    batch: Batch,
    augment: Augment,
    schedules: Schedules,
    rule: StepRule,
    want_health: bool,
    parallel: Parallel,
) -> _Gradients:
    """Forward, loss and backward; gradients stay in `.grad`, the new centre is returned, not applied."""
    state.optimizer.zero_grad(set_to_none=True)
    sums, outputs = None, list[Outputs]()
    for number in range(rule.accumulate):
        part = batch.part(number, rule.accumulate)
        is_last = number == rule.accumulate - 1
        with parallel.backward(is_last=is_last):
            own, seen = _forward_backward(state, part, augment, schedules, rule, want_health)
        sums = own if sums is None else sums + own
        outputs += [] if seen is None else [seen]
    assert sums is not None
    # The loss travels with the centre: one collective, and the same bits on every rank.
    sum_K, loss = torch.split(parallel.ranks.add_(sums), [state.center_1K.shape[1], 1])
    with phase("clipping"):
        norm, head_norm = _clip(state.student, rule.clip_grad, parallel)
    health = None
    if want_health:
        joined = Outputs(*(parallel.ranks.gather(piece, 1) for piece in Outputs.joined(outputs)))
        health = measure_health(joined, loss=loss[0], center_1K=state.center_1K)
    num_rows = NUM_GLOBAL * rule.batch_size
    center_1K = moved_center(state.center_1K, sum_K[None], num_rows, rule.center_momentum)
    return _Gradients(float(loss), center_1K, norm, head_norm, health)


def _forward_backward(
    state: TrainState, batch: Batch, augment: Augment, schedules: Schedules, rule: StepRule, want_health: bool
) -> tuple[Tensor, Outputs | None]:
    """One pass over some images of the batch: the sums of teacher logits and of the loss in one row (K + 1,)."""
    index = batch.step - 1  # schedules count the steps from 0
    device = state.center_1K.device
    with phase("augmentation"):
        crops = augment(batch.images.to(device), batch.sample_ids_B, batch.epoch)
    scales = drop_scales(
        seed=rule.seed, step=batch.step, sample_ids_B=batch.sample_ids_B, num_crops=len(crops),
        rate=rule.drop_path_rate, depth=rule.depth,
    )  # fmt: skip
    with rule.autocast(device):
        with phase("teacher forward"), torch.no_grad():
            teacher_TBK, teacher_TBD = state.teacher(crops[:NUM_GLOBAL])
        with phase("student forward"):
            student_VBK, student_VBD = state.student(crops, None if scales is None else scales.to(device))
    with phase("loss"):
        terms = dino_loss(
            student_VBK, teacher_TBK, state.center_1K,
            student_temp=rule.student_temp, teacher_temp=schedules.teacher_temp_at(index), num_images=rule.batch_size,
        )  # fmt: skip
    with phase("backward"):
        terms.loss.backward()  # type: ignore[no-untyped-call]
    sums = torch.cat([logit_sum(teacher_TBK)[0], terms.loss.detach()[None]])
    return sums, Outputs.of(terms.teacher_probs_TBK, student_VBD, teacher_TBD) if want_health else None


def _clip(student: nn.Module, max_norm: float | None, parallel: Parallel) -> tuple[float, float]:
    """Clip each parameter's gradient by itself; the norms of all gradients and of the head's, before clipping."""
    named = [(name, local_part(p.grad)) for name, p in student.named_parameters() if p.grad is not None]
    norms = clip_per_parameter_([gradient for _, gradient in named], max_norm, parallel.whole_norms).double().square()
    in_head = torch.tensor([name.startswith("head.") for name, _ in named], device=norms.device)
    total, head = torch.stack([norms.sum(), (norms * in_head).sum()]).sqrt().tolist()
    return total, head


def _apply(state: TrainState, step: int, center_1K: Tensor, schedules: Schedules, rule: StepRule) -> None:
    """The update: optimizer, teacher and centre together."""
    index = step - 1
    set_hyper(state.optimizer, lr=schedules.lr_at(index), weight_decay=schedules.weight_decay_at(index))
    if schedules.last_layer_frozen_at(index):
        freeze_last_layer_(dict(state.student.named_parameters()))
    with phase("optimizer"):
        state.optimizer.step()
    with phase("teacher update"):
        ema_update_(
            [local_part(parameter) for parameter in state.teacher.parameters()],
            [local_part(parameter) for parameter in state.student.parameters()],
            schedules.teacher_momentum_at(index),
        )
    state.center_1K.copy_(center_1K)


@contextmanager
def _buffers_put_back_on_error(*models: nn.Module) -> Iterator[None]:
    buffers = [buffer for model in models for buffer in model.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BaseException:
        for buffer, old in zip(buffers, kept, strict=True):
            buffer.copy_(old)
        raise


def _update_ratio(before: list[Tensor], after: list[nn.Parameter], parallel: Parallel) -> float:
    """Norm of the update over the norm of the parameters."""
    moves = torch._foreach_sub([local_part(parameter) for parameter in after], before)
    moved = parallel.whole_norms(torch.stack(torch._foreach_norm(moves))).norm()
    size = parallel.whole_norms(torch.stack(torch._foreach_norm(before))).norm()
    return float(moved / size)
