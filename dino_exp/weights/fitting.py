"""Weights of a file into a model that is about to be trained: what fits, what is left out, and what is refused.

The backbone is taken whole or not at all; only its position table may be of another grid. The head is taken where
every tensor of it fits, and else stays as it was initialised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dino_exp.errors import ConfigError
from dino_exp.weights.architecture import Dimensions, Shape, dimensions_of, types_problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dino_exp.weights.files import WeightFile

POSITIONS = "pos_embed"
# What other programs keep beside a backbone, and what its class token does not depend on.
_BESIDE = ("fc.", "fc_norm.", "mask_token", "pooler.", "classifier.", "head_dist.")
_MOST_NAMED = 3
_MOST_RECORDED = 50


class MisfitError(ConfigError):
    """Weights of another model than the one that the settings describe. `dimensions`: of the file's, where known."""

    def __init__(self, problem: str, dimensions: Dimensions | None) -> None:
        super().__init__(problem)
        self.dimensions = dimensions


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Names under `backbone.` and `head.`: taken from the file, left as initialised, and in the file only.

    `resized` says from which grid to which the position table goes, `head_left` why a head in the file is not taken.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[int, int] | None = None
    head_left: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For records; of long lists the beginning."""
        return {
            "loaded": len(self.loaded),
            "missing": list(self.missing[:_MOST_RECORDED]),
            "num_missing": len(self.missing),
            "unexpected": [name[:100] for name in self.unexpected[:_MOST_RECORDED]],
            "num_unexpected": len(self.unexpected),
            "resized": None if self.resized is None else list(self.resized),
            "head_left": self.head_left,
        }

    @property
    def text(self) -> str:
        """For people, in one line."""
        parts = [f"{len(self.loaded)} tensors loaded"]
        if self.resized is not None:
            was, now = self.resized
            parts.append(f"position table resized from {was}x{was} to {now}x{now}")
        if self.missing:
            parts.append(f"{len(self.missing)} not in the file stay as initialised ({_some(self.missing)})")
        if self.head_left is not None:
            parts.append(f"its head was not taken: {self.head_left}")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} not used ({_some(self.unexpected)})")
        return "; ".join(parts)


def plan_fit(backbone: Mapping[str, Shape], head: Mapping[str, Shape], model: Mapping[str, Shape]) -> Fit:
    """How the shapes of a file fit those of a model (`backbone.*` and `head.*`). Raises MisfitError."""
    ours = _below("backbone.", model)
    problems, resized = _differences(backbone, ours)
    extra = [name for name in backbone if name not in ours]
    strange = [name for name in extra if not name.startswith(_BESIDE)]
    if strange:
        problems.append(f"the model has no {_some(strange)}")
    if problems:
        raise MisfitError("; ".join(problems), dimensions_of(backbone))
    our_head = _below("head.", model)
    taken, head_left = _head_fit(head, our_head)
    left = [f"head.{name}" for name in head if name not in taken]
    return Fit(
        loaded=tuple([f"backbone.{name}" for name in ours] + [f"head.{name}" for name in taken]),
        missing=tuple(f"head.{name}" for name in our_head if name not in taken),
        unexpected=tuple([f"backbone.{name}" for name in extra] + left),
        resized=resized,
        head_left=head_left,
    )


def _differences(found: Mapping[str, Shape], ours: Mapping[str, Shape]) -> tuple[list[str], tuple[int, int] | None]:
    """What keeps a backbone from being taken, and the grids of its position table where they differ."""
    missing = [name for name in ours if name not in found]
    other = [name for name in ours if name in found and found[name] != ours[name]]
    resized = _grids(found.get(POSITIONS, ()), ours[POSITIONS]) if POSITIONS in other else None
    if resized is not None:
        other.remove(POSITIONS)
    shown = [f"{name} is {found[name]} in the file, {ours[name]} in the model" for name in other[:_MOST_NAMED]]
    if len(other) > _MOST_NAMED:
        shown.append(f"and {len(other) - _MOST_NAMED} more")
    return [*shown, *([f"the file has no {_some(missing)}"] if missing else [])], resized


def _grids(found: Shape, ours: Shape) -> tuple[int, int] | None:
    """The sides of two square position tables of equal width, (1, 1 + side * side, D); None where one is not that."""
    if len(found) != 3 or found[0] != 1 or found[2] != ours[2] or found[1] < 2:
        return None
    was, now = math.isqrt(found[1] - 1), math.isqrt(ours[1] - 1)
    return (was, now) if was * was == found[1] - 1 else None


def _head_fit(found: Mapping[str, Shape], ours: Mapping[str, Shape]) -> tuple[frozenset[str], str | None]:
    """The names of the head that are taken: all or none, and why none of those that are there."""
    if not found or found == ours:
        return frozenset(found), None
    if not any(name.startswith("last_layer.") for name in found):
        return frozenset(), "it is not a head of DINO"
    name = next(name for name in {**ours, **found} if found.get(name) != ours.get(name))
    return frozenset(), f"{name} is {found.get(name, 'absent')} in the file, {ours.get(name, 'absent')} in the model"


def load_into(model: nn.Module, file: WeightFile) -> Fit:
    """Put the weights of a file into a model with `backbone` and `head`. Raises MisfitError before anything changes."""
    import torch

    live = model.state_dict()
    given = {f"backbone.{name}": tensor for name, tensor in file.model.backbone.items()}
    given |= {f"head.{name}": tensor for name, tensor in file.model.head.items()}
    fit = plan_fit(_shapes(file.model.backbone), _shapes(file.model.head), _shapes(live))
    problem = types_problem({name: given[name] for name in fit.loaded}, live)
    if problem is not None:
        raise MisfitError(problem, None)
    bad = [name for name in fit.loaded if not torch.isfinite(given[name].to(live[name].dtype)).all()]
    if bad:
        raise MisfitError(f"{_some(bad)}: holds values that are no numbers (NaN or infinite)", None)
    with torch.no_grad():
        for name in fit.loaded:
            tensor = given[name]
            if fit.resized is not None and name == f"backbone.{POSITIONS}":
                tensor = resized_positions(tensor, fit.resized[1])
            live[name].copy_(tensor)
    return fit


def resized_positions(table_1ND: Tensor, side: int) -> Tensor:
    """A position table (1, 1 + g * g, D) for `side` x `side`, by the official interpolation; the class's row stays."""
    import torch

    from dino_exp.models.vit import resize_grid

    _, num, width = table_1ND.shape
    base = math.isqrt(num - 1)
    grid_1Dgg = table_1ND[:, 1:].double().reshape(1, base, base, width).permute(0, 3, 1, 2)
    resized_1ND = resize_grid(grid_1Dgg, side, side).permute(0, 2, 3, 1).reshape(1, side * side, width)
    return torch.cat((table_1ND[:, :1], resized_1ND.to(table_1ND.dtype)), dim=1)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _below(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(name[:100] for name in names[:_MOST_NAMED]) + more
