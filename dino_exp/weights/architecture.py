"""What a backbone is, as far as its settings and the shapes of its tensors tell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dino_exp.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from dino_exp.models.vit import VisionTransformer

Shape = tuple[int, ...]

FACTS, ARCHITECTURE = "dino_exp", "architecture"  # where exports say what they hold

_SETTINGS = {
    "image_size": "data", "patch_size": "data", "embed_dim": "model", "depth": "model", "num_heads": "model",
    "mlp_ratio": "model",
}  # fmt: skip
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_MOST = 1 << 31  # of any number here; files of strangers say what they like, and integers of Python have no end
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """What shapes tell of a backbone: all but the number of heads. `grid` is the side of the position table."""

    embed_dim: int
    depth: int
    hidden_dim: int
    patch_size: int
    in_channels: int
    grid: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The arguments of a `VisionTransformer`; image and patch size in pixels. Raises ValueError for impossible ones."""

    image_size: int
    patch_size: int
    in_channels: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float

    def __post_init__(self) -> None:
        whole = [value for name, value in vars(self).items() if name != "mlp_ratio"]
        if not all(type(value) is int and 0 < value < _MOST for value in whole):
            raise ValueError(f"expected whole numbers from 1 on, below {_MOST}")
        if type(self.mlp_ratio) not in (int, float) or not 0 < self.mlp_ratio < _MOST:
            raise ValueError(f"expected an mlp_ratio above 0 and below {_MOST}")
        if self.embed_dim % self.num_heads or self.image_size % self.patch_size:
            raise ValueError("expected heads that divide the width, and patches that divide the image")

    @property
    def hidden_dim(self) -> int:
        """Width of a block's MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def dimensions(self) -> Dimensions:
        """What the shapes of such a backbone tell."""
        return Dimensions(
            embed_dim=self.embed_dim,
            depth=self.depth,
            hidden_dim=self.hidden_dim,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            grid=self.image_size // self.patch_size,
        )

    def as_json(self) -> dict[str, Any]:
        """Its fields, for records."""
        return asdict(self)


def dimensions_of(shapes: Mapping[str, Shape]) -> Dimensions | None:
    """The dimensions of a backbone by its tensors' official names and shapes; None where it is no such backbone."""
    kernel, table = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    hidden = shapes.get("blocks.0.mlp.fc1.weight", ())
    if len(kernel) != 4 or len(table) != 3 or len(hidden) != 2 or kernel[2] != kernel[3] or table[1] < 2:
        return None
    grid = math.isqrt(table[1] - 1)
    if grid * grid != table[1] - 1:
        return None
    return Dimensions(
        embed_dim=kernel[0],
        depth=len({found[1] for name in shapes if (found := _BLOCK.match(name))}),
        hidden_dim=hidden[0],
        patch_size=kernel[2],
        in_channels=kernel[1],
        grid=grid,
    )


def architecture_of(settings: Any, shapes: Mapping[str, Shape], where: str) -> Architecture:
    """The backbone that recorded settings (`{"model": {...}, "data": {...}}`) and the shapes of its tensors agree on.

    Raises CorruptCheckpointError where either is not that of a backbone, or where they differ.
    """
    found = _dimensions(shapes, where)
    try:
        values = {name: settings[section][name] for name, section in _SETTINGS.items()}
        made = Architecture(in_channels=found.in_channels, **values)
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise CorruptCheckpointError(
            f"{where}: its settings do not describe a backbone ({type(problem).__name__}: {str(problem)[:80]})"
        ) from problem
    _check_dimensions(made, found, where)
    return made


def check_shapes(said: Architecture, shapes: Mapping[str, Shape], where: str) -> None:
    """Whether tensors of these shapes can be those of what a file says, before anything of that size is built.

    Raises CorruptCheckpointError where they are not a backbone's, or another's.
    """
    _check_dimensions(said, _dimensions(shapes, where), where)


def _dimensions(shapes: Mapping[str, Shape], where: str) -> Dimensions:
    found = dimensions_of(shapes)
    if found is None:
        raise CorruptCheckpointError(f"{where}: holds no backbone of a vision transformer under the official names")
    return found


def _check_dimensions(said: Architecture, found: Dimensions, where: str) -> None:
    if said.dimensions != found:
        raise CorruptCheckpointError(f"{where}: its settings say {said.dimensions}, its tensors {found}")


def types_problem(found: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> str | None:
    """Which tensor has values of a type that the model's are not made from; None where all are fit.

    Floating numbers are, of the types that every machine computes with; others only as the model has them (counters).
    """
    for name, tensor in found.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in _FLOATS and (tensor.dtype != live[name].dtype):
            return f"{name[:100]} holds values of type {kind}, expected one of {', '.join(_FLOATS)}"
    return None


def build_backbone(architecture: Architecture, tensors: Mapping[str, Tensor], where: str) -> VisionTransformer:
    """The model of these tensors (official names), in evaluation mode, on their device, in float32.

    Raises CorruptCheckpointError where a name is missing or unexpected, or a shape is another, or values are of a type
    that is not floating, or no finite numbers.
    """
    import torch

    from dino_exp.models.vit import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(**architecture.as_json())
    live = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in live.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(name for name in {**expected, **found} if expected.get(name) != found.get(name))
        name = differing[0]
        raise CorruptCheckpointError(
            f"{where}: {len(differing)} tensors are not those of its settings, such as {name[:100]}: found "
            f"{found.get(name, 'none')}, expected {expected.get(name, 'none')}"
        )
    problem = types_problem(tensors, live)
    if problem is not None:
        raise CorruptCheckpointError(f"{where}: {problem}")
    in_float32 = {name: tensor.float() for name, tensor in tensors.items()}
    bad = next((name for name, tensor in in_float32.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise CorruptCheckpointError(
            f"{where}: {bad[:100]} holds values that are no numbers in float32 (NaN or infinite)"
        )
    model.load_state_dict(in_float32, assign=True)
    return model.eval()
