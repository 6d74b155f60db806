"""Which box of which tensor a process writes: all of it, or a part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """A box of the tensor `name` that begins at `offset`; `whole` is that tensor's shape, `label` its key in a pack."""

    name: str
    offset: tuple[int, ...]
    whole: tuple[int, ...]
    label: str


def whole_pieces(tensors: Mapping[str, Tensor]) -> dict[Piece, Tensor]:
    """Every tensor in one piece, under its own name."""
    return {Piece(name, (0,) * tensor.ndim, tuple(tensor.shape), name): tensor for name, tensor in tensors.items()}
