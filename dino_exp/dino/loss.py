"""DINO's loss and the centre of the teacher's logits. Caron et al. 2021, equations 1 to 4.

Shapes: V views the student sees, the first T of which the teacher sees too; B images, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class DINOLossTerms:
    """The loss of a batch (a scalar that carries the gradient) and the teacher's distributions behind it."""

    loss: Tensor
    teacher_probs_TBK: Tensor


def dino_loss(
    student_VBK: Tensor,
    teacher_TBK: Tensor,
    center_1K: Tensor,
    *,
    student_temp: float,
    teacher_temp: float,
    num_images: int | None = None,
    gradient_scale: Tensor | None = None,
) -> DINOLossTerms:
    """Mean cross-entropy, in nats, over the pairs of a teacher's view and any other view of the student.

    `num_images`: of the whole batch, where these B are a part of it; the losses of its parts add up to its loss.
    `gradient_scale` multiplies the gradient, not the loss, before it is rounded to the precision of the logits.

    The first T views of the student are the teacher's own, in the same order. Half-precision logits are
    taken to float32 first. No gradient reaches the teacher. The centre is read only: see `updated_center`.
    """
    num_targets, (num_views, num_here, _) = len(teacher_TBK), student_VBK.shape
    assert num_views >= max(num_targets, 2), f"no pairs among {num_views} views and {num_targets} targets"
    with torch.no_grad():
        probs_TBK = torch.softmax((_precise(teacher_TBK) - center_1K) / teacher_temp, dim=-1)
    num_pairs = num_targets * (num_views - 1)
    share = 1 / (num_pairs * (num_here if num_images is None else num_images))
    loss: Tensor = _CrossEntropies.apply(student_VBK, probs_TBK, 1 / student_temp, share, gradient_scale)  # type: ignore[no-untyped-call]
    return DINOLossTerms(loss=loss, teacher_probs_TBK=probs_TBK)


class _CrossEntropies(torch.autograd.Function):
    """`share` times the sum of the cross-entropies of all pairs; the gradient is made with it, view by view.

    A target q sums to 1, so its cross-entropy with scaled logits s is logsumexp(s) - q.s, and q can meet the sum of its
    partners' logits at once: one reduction a view instead of a log_softmax a pair. The gradient of a view is its
    softmax, once for each target that it meets, less these targets. Nothing as large as the logits is kept but that.
    """

    @staticmethod
    def forward(
        ctx: Any, student_VBK: Tensor, probs_TBK: Tensor, sharpness: float, share: float, scale: Tensor | None
    ) -> Tensor:
        num_targets, all_targets_BK = len(probs_TBK), probs_TBK.sum(dim=0)
        gradient_VBK = torch.empty_like(student_VBK) if ctx.needs_input_grad[0] else None
        losses = []
        for view, logits_BK in enumerate(student_VBK):
            is_target = view < num_targets
            num_met = num_targets - is_target
            target_BK = all_targets_BK - probs_TBK[view] if is_target else all_targets_BK
            scaled_BK = _precise(logits_BK) * sharpness
            normaliser_B = torch.logsumexp(scaled_BK, dim=-1)
            losses.append(num_met * normaliser_B.sum() - torch.dot(target_BK.flatten(), scaled_BK.flatten()))
            if gradient_VBK is not None:
                softmax_BK = scaled_BK.sub_(normaliser_B[:, None]).exp_()
                gradient_BK = torch.sub(softmax_BK.mul_(num_met), target_BK, out=softmax_BK)
                gradient_BK.mul_(sharpness * share)
                gradient_VBK[view] = gradient_BK if scale is None else gradient_BK.mul_(scale)
        ctx.gradient_VBK = gradient_VBK
        return torch.stack(losses).sum() * share

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = gradients
        given, ctx.gradient_VBK = ctx.gradient_VBK, None  # it is changed in place, so it serves once
        return given.mul_(gradient), None, None, None, None


@torch.no_grad()
def updated_center(center_1K: Tensor, teacher_TBK: Tensor, momentum: float) -> Tensor:
    """The next centre (1, K): `momentum` times the old, the rest from the mean of the raw teacher logits.

    A new tensor: a step puts it in place together with the optimizer's update, or not at all. The loss of a
    step uses the centre of the steps before it, as in the official code.
    """
    return moved_center(center_1K, logit_sum(teacher_TBK), teacher_TBK[..., 0].numel(), momentum)


@torch.no_grad()
def logit_sum(teacher_TBK: Tensor) -> Tensor:
    """The sum (1, K) of raw teacher logits over views and images: parts of a batch add up to it."""
    return _precise(teacher_TBK).flatten(0, 1).sum(dim=0, keepdim=True)


@torch.no_grad()
def moved_center(center_1K: Tensor, sum_1K: Tensor, num_rows: int, momentum: float) -> Tensor:
    """See `updated_center`, from the sum over `num_rows` rows of logits."""
    mean_1K = sum_1K / num_rows
    return center_1K * momentum + mean_1K.to(center_1K.dtype) * (1 - momentum)


def _precise(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
