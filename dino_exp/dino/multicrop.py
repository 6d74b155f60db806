"""One forward pass of backbone and head over crops of several sizes.

Shapes: V crops (views) of each image, B images, C channels, H and W pixels, D features, K prototypes,
L layers, R = V x B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


class MultiCropModel(nn.Module):
    """A backbone and a head; parameters are named `backbone.*` and `head.*`, as in the official code."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def features(self, images: Tensor) -> Tensor:
        """Backbone features (B, D) of images (B, C, H, W) as they are."""
        features: Tensor = self.backbone(images)
        return features

    def forward(self, crops: Sequence[Tensor], drop_scales_L2VB: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (V, B, K) and backbone features (V, B, D) of V crops (B, C, H, W) of the same B images.

        Consecutive crops of equal width are one batch of the backbone, crop after crop, and all of them pass it
        together; all features pass the head as one batch, and that is what its batch norm sees. `drop_scales_L2VB` are
        the factors of stochastic depth (`dino_exp.dino.drop_path`); None drops no layer.
        """
        groups = [torch.cat(list(crops[first:end])) for first, end in _equal_widths(crops)]
        features_RD = self.backbone(groups, None if drop_scales_L2VB is None else drop_scales_L2VB.flatten(2))
        features_VBD = features_RD.unflatten(0, (len(crops), -1)).clone()
        # Neither result is a view of something: FSDP hangs its hooks on them.
        return self.head(features_VBD), features_VBD


def _equal_widths(crops: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of consecutive crops of the same width."""
    end = 0
    for _, group in groupby(crops, key=lambda crop: crop.shape[-1]):
        first, end = end, end + len(list(group))
        yield first, end
