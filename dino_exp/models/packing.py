"""Images of several sizes in one row of tokens, so that every matrix product meets all of them at once.

Shapes: B images of one size, N tokens of each, T tokens of all images, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """How tokens lie in a row: size after size, image after image. `groups`: images of a size, tokens of each."""

    groups: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all images, T."""
        return sum(images * tokens for images, tokens in self.groups)

    def split(self, tokens_TD: Tensor) -> list[Tensor]:
        """The tokens of each size, (B, N, D): views."""
        parts = torch.split(tokens_TD, [images * tokens for images, tokens in self.groups])
        return [part.view(*group, -1) for part, group in zip(parts, self.groups, strict=True)]

    def split_images(self, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """The values of the images of each size, which lie along `dim`: views."""
        return torch.split(values, [images for images, _ in self.groups], dim=dim)

    def per_token(self, values: Tensor) -> Tensor:
        """Values of all images (..., images), repeated for each of their tokens: (..., T, 1)."""
        parts = self.split_images(values, dim=-1)
        repeated = [
            part[..., None].expand(*part.shape, tokens).flatten(-2)
            for part, (_, tokens) in zip(parts, self.groups, strict=True)
        ]
        return torch.cat(repeated, dim=-1)[..., None]


def packed(groups_BND: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """Tokens of several sizes in one row (T, D), and how they lie in it."""
    packing = Packing(tuple((len(group), group.shape[1]) for group in groups_BND))
    rows = [group.flatten(0, 1) for group in groups_BND]
    return rows[0] if len(rows) == 1 else torch.cat(rows), packing
