"""One optimisation step of DINO as a transaction (Caron et al. 2021; in the order of the official code).

Several ranks carry out a step together, each on its share of the images (`Parallel`).

Shapes: B images, V crops an image (two global first), K prototypes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_exp.data.images import Images, to_device
from dino_exp.data.loader import Batch
from dino_exp.dino.drop_path import drop_scales
from dino_exp.dino.health import Health, Outputs, measure_health
from dino_exp.dino.loss import dino_loss, logit_sum, moved_center
from dino_exp.dino.optim import clip_per_parameter_, ema_update_, freeze_last_layer_, optimizer_step, set_hyper
from dino_exp.dino.scaling import HALF
from dino_exp.dino.schedules import Schedules
from dino_exp.training.parallel import ALONE, Parallel, local_part
from dino_exp.training.phases import phase
from dino_exp.training.state import TrainState, Unread
from dino_exp.training.verdict import report_of, require, settle, step_counts

NUM_GLOBAL = 2

Augment = Callable[[Images, Tensor, int], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """The constants of a step: the global batch, temperatures, momenta, drop-path, clipping and precision.

    `accumulate`: in how many parts each rank takes its share of the batch, one after the other. `read_every`: after so
    many steps at most the host asks the device how they went; 1: it does before each update.
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
    read_every: int = 1

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of forward passes: autocast to half precision, or nothing for fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=HALF[self.precision])


@dataclass(frozen=True)
class StepMetrics:
    """What one step measured. `health` and the update's ratio are there only at logging steps.

    The numbers of other steps are None where the host has not asked for them (`StepRule.read_every`).
    """

    loss: float | None
    grad_norm: float | None
    grad_norm_head: float | None
    health: Health | None
    update_ratio: float | None


@dataclass
class _Gradients:
    """What a step computed before anything changes; numbers lie on the device."""

    loss: Tensor
    center_1K: Tensor
    norm: Tensor
    head_norm: Tensor
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

    Nothing of the state changes unless the loss and every gradient are finite: batch-norm statistics that the forward
    pass moved are put back when anything raises. While the update itself is applied, `state.torn` is true.
    `before_update` is called when everything is computed and no parameter is changed yet (a save under way may still
    copy them from the device).

    Raises NonFiniteError, after up to `rule.read_every` steps (`verdict.settle` asks earlier), and whatever the model
    or the augmentation raises.
    """
    reads_at_once = rule.read_every == 1
    read_now = want_health or len(state.unread) + 1 >= rule.read_every
    with _buffers_put_back_on_error(state.student, state.teacher) as buffers:
        gradients = _compute(state, batch, augment, schedules, rule, want_health, parallel)
        counts = step_counts(gradients.loss, gradients.norm, state.scaler, state.unread)
        report = report_of(gradients.loss, gradients.norm, counts)
        known_loss = require(batch.step, report, state.scaler) if reads_at_once else None
        before = [local_part(parameter).clone() for parameter in state.student.parameters()] if want_health else None
        if before_update is not None:
            before_update()
    num_with_moments = len(state.optimizer.state)
    state.torn = True
    if not reads_at_once:
        buffers.put_back_unless(counts)
    _apply(state, batch.step, gradients, schedules, rule, counts)
    if known_loss is None:
        state.unread.append(Unread(batch.step, report, num_with_moments))
    else:
        state.note_loss(known_loss)
    state.step = batch.step
    ratio = None if before is None else _update_ratio(before, list(state.student.parameters()), parallel)
    state.torn = False
    if not read_now:
        return StepMetrics(None, None, None, None, None)
    settle(state)
    loss, norm, head_norm = torch.stack([gradients.loss.double(), gradients.norm, gradients.head_norm]).tolist()
    return StepMetrics(loss, norm, head_norm, gradients.health, ratio)


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
        norm, head_norm = _clip(state, rule.clip_grad, parallel)
    health = None
    if want_health:
        joined = Outputs(*(parallel.ranks.gather(piece, 1) for piece in Outputs.joined(outputs)))
        health = measure_health(joined, loss=loss[0], center_1K=state.center_1K)
    num_rows = NUM_GLOBAL * rule.batch_size
    center_1K = moved_center(state.center_1K, sum_K[None], num_rows, rule.center_momentum)
    return _Gradients(loss[0], center_1K, norm, head_norm, health)


def _forward_backward(
    state: TrainState, batch: Batch, augment: Augment, schedules: Schedules, rule: StepRule, want_health: bool
) -> tuple[Tensor, Outputs | None]:
    """One pass over some images of the batch: the sums of teacher logits and of the loss in one row (K + 1,)."""
    index = batch.step - 1  # schedules count the steps from 0
    device = state.center_1K.device
    with phase("augmentation"):
        crops = augment(batch.images.to(device), batch.sample_ids_B, batch.epoch)
    drop = drop_scales(
        seed=rule.seed, step=batch.step, sample_ids_B=batch.sample_ids_B, num_crops=len(crops),
        rate=rule.drop_path_rate, depth=rule.depth,
    )  # fmt: skip
    with rule.autocast(device):
        with phase("teacher forward"), torch.no_grad():
            teacher_TBK, teacher_TBD = state.teacher(crops[:NUM_GLOBAL])
        with phase("student forward"):
            student_VBK, student_VBD = state.student(crops, None if drop is None else to_device(drop, device))
    with phase("loss"):
        terms = dino_loss(
            student_VBK, teacher_TBK, state.center_1K,
            student_temp=rule.student_temp, teacher_temp=schedules.teacher_temp_at(index), num_images=rule.batch_size,
            gradient_scale=None if state.scaler is None else state.scaler.scale,
        )  # fmt: skip
    with phase("backward"):
        terms.loss.backward()  # type: ignore[no-untyped-call]
    sums = torch.cat([logit_sum(teacher_TBK)[0], terms.loss.detach()[None]])
    return sums, Outputs.of(terms.teacher_probs_TBK, student_VBD, teacher_TBD) if want_health else None


def _clip(state: TrainState, max_norm: float | None, parallel: Parallel) -> tuple[Tensor, Tensor]:
    """Clip each parameter's gradient by itself; the norms of all gradients and of the head's, before clipping."""
    scale = None if state.scaler is None else state.scaler.scale
    parts = (state.student.backbone, state.student.head)
    of_parts = [[local_part(p.grad) for p in part.parameters() if p.grad is not None] for part in parts]
    together = [gradient for gradients in of_parts for gradient in gradients]
    norms_P = clip_per_parameter_(together, max_norm, parallel.whole_norms, scale).double()
    return norms_P.norm(), norms_P[len(of_parts[0]) :].norm()


def _apply(
    state: TrainState, step: int, gradients: _Gradients, schedules: Schedules, rule: StepRule, counts: Tensor
) -> None:
    """The update: optimizer, teacher and centre together; where the host has not asked, only if the step `counts`."""
    index, applies = step - 1, None if rule.read_every == 1 else counts
    set_hyper(state.optimizer, lr=schedules.lr_at(index), weight_decay=schedules.weight_decay_at(index))
    if schedules.last_layer_frozen_at(index):
        freeze_last_layer_(dict(state.student.named_parameters()))
    with phase("optimizer"):
        if state.scaler is None:
            optimizer_step(state.optimizer, applies)
        else:  # an overflow costs the student's update alone, as in the official code
            finite = gradients.norm.isfinite()
            optimizer_step(state.optimizer, finite & counts)
            state.scaler.update_(finite, counts)
    with phase("teacher update"):
        ema_update_(
            [local_part(parameter) for parameter in state.teacher.parameters()],
            [local_part(parameter) for parameter in state.student.parameters()],
            schedules.teacher_momentum_at(index),
            applies,
        )
    center_1K = gradients.center_1K
    state.center_1K.copy_(center_1K if applies is None else torch.where(applies, center_1K, state.center_1K))


@contextmanager
def _buffers_put_back_on_error(*models: nn.Module) -> Iterator[_Buffers]:
    buffers = _Buffers(models)
    try:
        yield buffers
    except BaseException:
        buffers.put_back()
        raise


class _Buffers:
    """The buffers of models, as they were."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._live = [buffer for model in models for buffer in model.buffers()]
        self._kept = [buffer.clone() for buffer in self._live]

    def put_back(self) -> None:
        for buffer, old in zip(self._live, self._kept, strict=True):
            buffer.copy_(old)

    def put_back_unless(self, counts: Tensor) -> None:
        """Without waiting for the device."""
        for buffer, old in zip(self._live, self._kept, strict=True):
            buffer.copy_(torch.where(counts, buffer, old))


def _update_ratio(before: list[Tensor], after: list[nn.Parameter], parallel: Parallel) -> float:
    """Norm of the update over the norm of the parameters."""
    moves = torch._foreach_sub([local_part(parameter) for parameter in after], before)
    moved = parallel.whole_norms(torch.stack(torch._foreach_norm(moves))).norm()
    size = parallel.whole_norms(torch.stack(torch._foreach_norm(before))).norm()
    return float(moved / size)
