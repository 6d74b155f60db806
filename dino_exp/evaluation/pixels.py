"""Pixels as features: what k-NN makes of images before anything was learned.

Shapes: B images, C channels, H x W pixels, S pixels along a side, D values of an image.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dino_exp.data.images import Images

SIDE = 32  # of the largest images that are compared pixel by pixel
MOST_IMAGES = 1 << 16  # with 32 x 32 pixels in three colours they take 0.8 GB


def raw_pixels(images: Images) -> Tensor:
    """(B, D) float32 from 0 to 255, of images that fill their canvas."""
    return images.pixels_BCHW.flatten(1).float()


def reduced_pixels(views_BCSS: Tensor) -> Tensor:
    """(B, D): views, as the model sees them, averaged down to 32 pixels a side where they are larger."""
    if views_BCSS.shape[-1] > SIDE:
        views_BCSS = functional.adaptive_avg_pool2d(views_BCSS, SIDE)
    return views_BCSS.flatten(1)
