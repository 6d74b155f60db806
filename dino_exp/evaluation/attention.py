"""Where the class token looks: the attention of the last block, one map a head (Caron et al. 2021, figure 1).

Shapes: B images, C channels, H x W pixels, rows x cols patches.
"""

from __future__ import annotations

from torch import Tensor

from dino_exp.evaluation.features import frozen
from dino_exp.models.vit import VisionTransformer


def class_attention(model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
    """Attention of the last block from the class token to every patch, (B, heads, rows, cols).

    `images_BCHW` are normalised as in training, of any size of at least one patch. The weights of a head, with the one
    of the class token to itself, which is left out here, sum to 1. The model is left as it was.
    """
    rows, cols = model.grid_of(*images_BCHW.shape[-2:])
    with frozen(model):
        weights_BH1N = model.last_attention(images_BCHW, num_queries=1)
    return weights_BH1N[:, :, 0, 1:].reshape(*weights_BH1N.shape[:2], rows, cols)
