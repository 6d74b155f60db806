"""DINO's loss and the centre of the teacher's logits. Caron et al. 2021, equations 1 to 4.

Shapes: V views the student sees, the first T of which the teacher sees too; B images, K prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

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
) -> DINOLossTerms:
    """Mean cross-entropy, in nats, over the pairs of a teacher's view and any other view of the student.

    `num_images`: of the whole batch, where these B are a part of it; the losses of its parts add up to its loss.

    The first T views of the student are the teacher's own, in the same order. Half-precision logits are
    taken to float32 first. No gradient reaches the teacher. The centre is read only: see `updated_center`.
    """
    num_targets, (num_views, num_here, _) = len(teacher_TBK), student_VBK.shape
    assert num_views >= max(num_targets, 2), f"no pairs among {num_views} views and {num_targets} targets"
    with torch.no_grad():
        probs_TBK = torch.softmax((_precise(teacher_TBK) - center_1K) / teacher_temp, dim=-1)
    # A target q sums to 1, so its cross-entropy with scaled logits s is logsumexp(s) - q.s, and q can meet
    # the sum of its partners' logits at once. One reduction a view instead of a log_softmax a pair: 121 ms,
    # not 319, forward and backward on one CPU thread (10 views, 16 images, 65536 prototypes).
    scaled_VBK = _precise(student_VBK) / student_temp
    normaliser_VB = torch.logsumexp(scaled_VBK, dim=-1)
    partners_TBK = scaled_VBK.sum(dim=0) - scaled_VBK[:num_targets]
    normalisers = num_targets * normaliser_VB.sum() - normaliser_VB[:num_targets].sum()
    total = normalisers - (probs_TBK * partners_TBK).sum()
    num_pairs = num_targets * (num_views - 1)
    num_images = num_here if num_images is None else num_images
    return DINOLossTerms(loss=total / (num_pairs * num_images), teacher_probs_TBK=probs_TBK)


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
