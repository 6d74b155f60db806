"""What patches have in common, as colours: the first three principal components of their features.

Shapes: B images, C channels, H x W pixels, rows x cols patches, D features, P patches of all images together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dino_exp.evaluation.features import frozen
from dino_exp.models.vit import VisionTransformer

NUM_COLOURS = 3
_LOW, _HIGH = 0.01, 0.99  # quantiles that become 0 and 1: a few odd patches must not take all of the range
_LEAST_SHARE = 1e-12  # of the variance: a component below it is rounding, not a direction


class PatchColours(NamedTuple):
    """Colours (B, rows, cols, 3) from 0 to 1, and the share of the variance that each of the three explains, (3,)."""

    colours: Tensor
    explained: Tensor


def patch_tokens(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """The features of every patch after the last block and the final norm, (B, rows, cols, D).

    `images_BCHW` are normalised as in training, of any size of at least one patch. The model is left as it was.
    """
    rows, cols = model.grid_of(*images_BCHW.shape[-2:])
    with frozen(model):
        tokens_BND = model.forward_tokens(images_BCHW)
    return tokens_BND[:, 1:].reshape(len(images_BCHW), rows, cols, -1)


def patch_colours(tokens: Tensor) -> PatchColours:
    """Patches (B, rows, cols, D) as colours, by the principal components of all of them together.

    Alike patches are coloured alike, also in different images. Each component is scaled so that its 1st and 99th
    percentiles are 0 and 1; one without variance is 0.5. Its sign is such that the feature which weighs most in it
    weighs positively, so that the same features always have the same colours.
    """
    patches_PD = tokens.detach().flatten(0, 2).double().cpu()
    components_DK, explained_K = _components(patches_PD)
    values_PK = (patches_PD - patches_PD.mean(dim=0)) @ components_DK
    low_K, high_K = (values_PK.quantile(share, dim=0) for share in (_LOW, _HIGH))
    has_range_K = (explained_K > _LEAST_SHARE) & (high_K > low_K)
    width_K = torch.where(has_range_K, high_K - low_K, torch.ones_like(high_K))
    scaled_PK = torch.where(has_range_K, (values_PK - low_K) / width_K, torch.full_like(values_PK, 0.5))
    return PatchColours(scaled_PK.clamp(0, 1).float().reshape(*tokens.shape[:3], NUM_COLOURS), explained_K)


def _components(patches_PD: Tensor) -> tuple[Tensor, Tensor]:
    """The first three principal directions (D, 3), the strongest first, and their shares of the variance (3,)."""
    centred_PD = patches_PD - patches_PD.mean(dim=0)
    variances_D, directions_DD = torch.linalg.eigh(centred_PD.T @ centred_PD)  # ascending
    num = min(NUM_COLOURS, len(variances_D))
    directions_DK = directions_DD.flip(1)[:, :num]
    largest_K = directions_DK.abs().argmax(dim=0)
    directions_DK = directions_DK * directions_DK.gather(0, largest_K[None]).sign()
    positive_D = variances_D.clamp(min=0).flip(0)
    explained_K = positive_D[:num] / positive_D.sum().clamp(min=torch.finfo(torch.float64).tiny)
    missing = NUM_COLOURS - num  # features of fewer than three dimensions
    return (
        torch.nn.functional.pad(directions_DK, (0, missing)),
        torch.nn.functional.pad(explained_K, (0, missing)),
    )
