"""Initial values: each element a pure function of (seed, name of the parameter, index of the element).

So neither torch's generators nor the order or depth in which modules are built can change a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from dino_exp.errors import ConfigError
from dino_exp.models.head import WeightNormLinear
from dino_exp.models.vit import VisionTransformer
from dino_exp.rng import Stream

Scheme = Literal["official", "fan_in"]
Floats = NDArray[np.float64]
Draw = Callable[[Floats], Floats]  # uniform numbers in (0, 1) to values
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CHUNK = 1 << 20  # elements drawn at once: bounds the memory of the generator to some tens of MB
_CUT = 2.0  # the official truncation is at the absolute values -2 and 2, whatever the standard deviation
_OFFICIAL_STD = 0.02
_FAN_IN_POSITION_STD = 0.2
_BRANCH_ENDS = ("attn.proj.weight", "mlp.fc2.weight")  # the last layers of a block's two branches


def materialise(
    make: Callable[[], ModuleT], *, seed: int, scheme: Scheme, device: torch.device | str = "cpu"
) -> ModuleT:
    """Build a module with `make` and initialise it, without drawing from any of torch's generators."""
    with torch.device("meta"):
        model = make()
    model = model.to_empty(device=device)
    initialise(model, seed=seed, scheme=scheme)
    return model


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int, scheme: Scheme) -> None:
    """Give every parameter and buffer of `model` its initial value, in place.

    `official`: linear weights, class token and positions normal with std 0.02 (cut at +-2), biases 0, norms
    1 and 0; patch convolution and prototypes uniform within +-1/sqrt(fan in), which is torch's default.
    `fan_in`: the same with linear weights of std 1/sqrt(fan in) and positions of std 0.2, for short trainings,
    where the features of the official scheme hardly differ between images. What a block adds to its input is made
    smaller by sqrt(2 / depth), so that a deep model starts, and learns, like one of two blocks (the idea of GPT-2).
    Raises ConfigError for another scheme, TypeError for a tensor that no rule covers.
    """
    if scheme not in get_args(Scheme):
        raise ConfigError(f"init.scheme must be one of {', '.join(get_args(Scheme))}, got {scheme!r}")
    for path, module in model.named_modules():
        tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, tensor in tensors.items():
            full_name = f"{path}.{name}" if path else name
            rule = _rule(module, name, scheme)
            if rule is None:
                raise TypeError(f"no initial value is known for {full_name} of a {type(module).__name__}")
            if scheme == "fan_in" and full_name.endswith(_BRANCH_ENDS):
                assert isinstance(module, nn.Linear)
                rule = _normal(module.in_features**-0.5 * _branch_gain(model))
            if isinstance(rule, float):
                tensor.fill_(rule)
            else:
                _fill(tensor, rule, Stream(seed, f"init.{full_name}"))


def _branch_gain(model: nn.Module) -> float:
    depth = max(len(part.blocks) for part in model.modules() if isinstance(part, VisionTransformer))
    return math.sqrt(2 / depth)


def _rule(module: nn.Module, name: str, scheme: Scheme) -> float | Draw | None:
    """How the tensor `name` of `module` starts: a constant, a distribution, or None when nobody knows."""
    match module, name:
        case nn.Linear(), "weight":
            return _normal(_OFFICIAL_STD if scheme == "official" else module.in_features**-0.5)
        case nn.Linear(), "bias":
            return 0.0
        case ((nn.LayerNorm() | nn.BatchNorm1d()), _):
            return 1.0 if name in ("weight", "running_var") else 0.0
        case nn.Conv2d(), _:
            return _uniform(module.in_channels * math.prod(module.kernel_size))
        case WeightNormLinear(), "weight_g":
            return 1.0
        case WeightNormLinear(), "weight_v":
            return _uniform(module.weight_v.shape[1])
        case VisionTransformer(), "pos_embed":
            return _normal(_OFFICIAL_STD if scheme == "official" else _FAN_IN_POSITION_STD)
        case VisionTransformer(), "cls_token":
            return _normal(_OFFICIAL_STD)
    return None


def _normal(std: float) -> Draw:
    """Normal around 0, truncated, by the inverse of the distribution function."""
    low, high = ndtr(-_CUT / std), ndtr(_CUT / std)
    return lambda uniform: std * ndtri(low + uniform * (high - low))


def _uniform(fan_in: int) -> Draw:
    bound = fan_in**-0.5
    return lambda uniform: bound * (2.0 * uniform - 1.0)


def _fill(tensor: Tensor, draw: Draw, stream: Stream) -> None:
    values = torch.empty(tensor.numel(), dtype=tensor.dtype)
    for index, start in enumerate(range(0, tensor.numel(), _CHUNK)):
        part = values[start : start + _CHUNK]
        part.copy_(torch.from_numpy(draw(stream.uniform(index, num=len(part)))))
    tensor.copy_(values.view(tensor.shape))
