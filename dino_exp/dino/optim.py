"""The parts of one optimisation step: groups, clipping, last-layer freeze, moving average.

Shapes: P parameters with a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from dino_exp.dino.lars import Lars
from dino_exp.errors import ConfigError

OptimizerName = Literal["adamw", "sgd", "lars"]

_LAST_LAYER = "last_layer"
_CLIP_EPS = 1e-6
_AT_ONCE = 32  # parameters


def parameter_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The trained parameters that decay, and those that do not: biases and everything of one dimension.

    As in the official code, class token, positions and the prototypes' lengths (K x 1) do decay.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (exempt if name.endswith(".bias") or parameter.ndim < 2 else decayed).append(parameter)
    return [decayed, exempt]


def build_optimizer(
    name: OptimizerName,
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    fused: bool = True,
    eta: float = 0.001,
    whole_norms: Callable[[Tensor], Tensor] | None = None,
    local_part: Callable[[Tensor], Tensor] | None = None,
) -> Optimizer:
    """Optimizer over `parameter_groups(model)`; before each step `set_hyper` gives it lr and weight decay.

    `betas`, `eps` and `fused` belong to adamw, `momentum` to sgd and lars, `eta`, `whole_norms` and `local_part` to
    lars (see `Lars`). Raises ConfigError for another name.
    """
    # Fused pays on a CPU as well: an AdamW step of ViT-S with its head takes 30 ms on one thread, not 87
    # (plain loop) or 131 (foreach); one of ViT-nano 0.24, not 0.95 or 0.69.
    groups = [{"params": parameters, "weight_decay": 0.0} for parameters in parameter_groups(model)]
    match name:
        case "adamw":
            return AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=fused)
        case "sgd":
            # Never fused: that kernel fails where some parameters have no momentum yet (a frozen last layer).
            return SGD(groups, lr=0.0, momentum=momentum, weight_decay=0.0)
        case "lars":
            return Lars(groups, momentum=momentum, eta=eta, whole_norms=whole_norms, local_part=local_part)
    raise ConfigError(f"optimizer.name must be one of {', '.join(get_args(OptimizerName))}, got {name!r}")


def set_hyper(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set the values of the coming step: `lr` for all parameters, `weight_decay` for those that decay."""
    decayed, exempt = optimizer.param_groups
    decayed["lr"] = exempt["lr"] = lr
    decayed["weight_decay"] = weight_decay


@torch.no_grad()
def clip_per_parameter_(
    gradients: list[Tensor],
    max_norm: float | None,
    whole_norms: Callable[[Tensor], Tensor] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Scale each gradient on its own to an L2 norm of at most `max_norm`; None or 0 leaves them as they are.

    Returns their norms before clipping (P,), on the device. Where they are parts of gradients, `whole_norms` makes the
    norms of whole ones from those of the parts. `scale`: what they are multiplied by, which is taken back first.
    """
    norms_P = torch.stack(torch._foreach_norm(gradients))
    norms_P = norms_P if whole_norms is None else whole_norms(norms_P)
    norms_P = norms_P if scale is None else norms_P / scale
    factors_P = (max_norm / (norms_P + _CLIP_EPS)).clamp(max=1.0) if max_norm else torch.ones_like(norms_P)
    if max_norm or scale is not None:
        factors_P = factors_P if scale is None else factors_P / scale
        changed = list(range(len(gradients)))
        # A factor of exactly 1 changes no bit: nobody waits for a device to learn of one, and on a CPU it is known.
        if factors_P.device.type == "cpu":
            changed = factors_P.ne(1).nonzero()[:, 0].tolist()
        if changed:
            torch._foreach_mul_([gradients[place] for place in changed], [factors_P[place] for place in changed])
    return norms_P


def freeze_last_layer_(named_parameters: Mapping[str, nn.Parameter]) -> None:
    """Take away the gradients of the prototypes, so that the optimizer neither moves nor decays them."""
    for name, parameter in named_parameters.items():
        if _LAST_LAYER in name:
            parameter.grad = None


def optimizer_step(optimizer: Optimizer, applies: Tensor | None) -> None:
    """A step of the optimizer, unless `applies` is a false tensor.

    The fused kernels look at it on the device; for the others the host waits for it.
    """
    if applies is None:
        optimizer.step()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = (~applies).float()  # type: ignore[attr-defined]  # as torch's GradScaler tells them
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(applies):
        optimizer.step()


@torch.no_grad()
def ema_update_(
    teacher: Iterable[Tensor], student: Iterable[Tensor], momentum: float, applies: Tensor | None = None
) -> None:
    """Move each parameter of the teacher to `momentum` times itself plus the rest of the student's.

    Unless `applies` is a false tensor, for which the host does not wait.
    """
    moving, towards = list(teacher), list(student)
    if applies is None:
        torch._foreach_lerp_(moving, towards, 1 - momentum)
        return
    weight = applies.double() * (1 - momentum)
    for start in range(0, len(moving), _AT_ONCE):  # the differences take memory
        some, ways = moving[start : start + _AT_ONCE], towards[start : start + _AT_ONCE]
        moves = torch._foreach_sub(ways, some)
        torch._foreach_mul_(moves, weight.to(moves[0].dtype))
        torch._foreach_add_(some, moves)
