"""When a model is called collapsed, by two numbers of a row. Pure: who reads a log asks here, too."""

from __future__ import annotations

from typing import Literal

CollapseKind = Literal["uniform", "dominance"]

# Trainings on digits without batch norm in the head stay at a divergence of 0.03 to 0.08 nats and 0.97 to 0.99 of the
# highest entropy for hundreds of steps; three that learned never went below 0.37 nats (docs/decisions/0005).
MAX_DIVERGENCE = 0.1  # nats
UNIFORM_RATIO = 0.97
DOMINANCE_RATIO = 0.5  # "far below" ln K; the dominance that was seen had 0.14

_ADVICE: dict[CollapseKind, str] = {
    "uniform": "every image gets the uniform distribution over prototypes. Sharpen the teacher (lower "
    "loss.teacher_temp), lower loss.center_momentum, or let the head keep images apart (loss.use_bn=true)",
    "dominance": "a few prototypes take every image. Soften the teacher (raise loss.teacher_temp), let the "
    "centre follow faster (lower loss.center_momentum), or let the head keep images apart (loss.use_bn=true)",
}


def collapse_kind(entropy_ratio: float, kl: float) -> CollapseKind | None:
    """The kind of collapse that these numbers show, or None. Caron et al. 2021, section 5.3.

    A KL near 0 says that the student need not look at the image to agree with the teacher. The entropy of a
    `uniform` teacher is ln K; under the `dominance` of few prototypes it is far below. A model may start out
    looking uniform, so one reading is no verdict.
    """
    if not kl < MAX_DIVERGENCE:
        return None
    if entropy_ratio > UNIFORM_RATIO:
        return "uniform"
    return "dominance" if entropy_ratio < DOMINANCE_RATIO else None


def describe_collapse(kind: CollapseKind, *, entropy_ratio: float, kl: float) -> str:
    """What happened, by which numbers, and what to change."""
    return (
        f"collapse ({kind}): {_ADVICE[kind]}. Found teacher entropy / ln K = {entropy_ratio:.3f} and "
        f"KL(teacher || student) = {kl:.4f} nats; a training that learns keeps KL above {MAX_DIVERGENCE}"
    )
