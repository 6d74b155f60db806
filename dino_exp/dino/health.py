"""Is the training healthy? Numbers for the log, and the two ways in which self-distillation collapses.

Shapes: V student's views, T teacher's views, B images, K prototypes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Health:
    """Health of one batch. Entropies in nats; shares and ratios from 0 to 1."""

    entropy_ratio: float  # teacher's mean entropy / ln K
    kl: float  # mean KL(teacher || student) over the pairs of the loss
    feature_std: float  # of the teacher: see `feature_std`
    student_feature_std: float
    center_norm: float
    prototypes_used: float  # share of prototypes that are the first choice of some image
    student_teacher_cosine: float  # of the features of the same crop


@dataclass(frozen=True)
class Outputs:
    """What health is measured on: what both models made of the teacher's views of some images."""

    entropy_TB: Tensor  # of the teacher's distributions
    choice_TB: Tensor  # its first choices among the prototypes
    student_TBD: Tensor  # features
    teacher_TBD: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, teacher_probs_TBK: Tensor, student_features_VBD: Tensor, teacher_features_TBD: Tensor) -> Outputs:
        """From one forward pass."""
        return cls(
            torch.special.entr(teacher_probs_TBK).sum(dim=-1),
            teacher_probs_TBK.argmax(dim=-1),
            student_features_VBD[: len(teacher_features_TBD)].detach().float(),
            teacher_features_TBD.float(),
        )

    @classmethod
    def joined(cls, parts: Sequence[Outputs]) -> Outputs:
        """Of all images, from parts of the batch."""
        return parts[0] if len(parts) == 1 else cls(*(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True)))

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.entropy_TB, self.choice_TB, self.student_TBD, self.teacher_TBD)


@torch.no_grad()
def measure_health(outputs: Outputs, *, loss: Tensor, center_1K: Tensor) -> Health:
    """Health of the batch with this loss; waits for the device once."""
    num_prototypes = center_1K.shape[-1]
    student_TBD, teacher_TBD = outputs.student_TBD, outputs.teacher_TBD
    entropy = outputs.entropy_TB.mean()
    used_K = torch.zeros(num_prototypes, device=center_1K.device)
    used_K.index_fill_(0, outputs.choice_TB.flatten(), 1.0)
    values = {
        "entropy_ratio": entropy / math.log(num_prototypes),
        # Every target meets equally many views: the mean cross-entropy less the mean entropy is the mean KL.
        "kl": loss - entropy,
        "feature_std": feature_std(teacher_TBD),
        "student_feature_std": feature_std(student_TBD),
        "center_norm": torch.linalg.vector_norm(center_1K),
        "prototypes_used": used_K.mean(),
        "student_teacher_cosine": functional.cosine_similarity(student_TBD, teacher_TBD, dim=-1).mean(),
    }
    on_host = torch.stack([value.double() for value in values.values()]).tolist()
    return Health(**dict(zip(values, on_host, strict=True)))


def feature_std(features: Tensor) -> Tensor:
    """Mean std of the dimensions of unit-length features (..., D), times sqrt(D); 1 where isotropic."""
    rows_RD = functional.normalize(features.flatten(0, -2), dim=-1)
    return rows_RD.std(dim=0, correction=0).mean() * math.sqrt(rows_RD.shape[-1])
