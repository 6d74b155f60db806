"""Colour operations on crops, as PIL defines them, in place: each returns the crops that it was given.

They are made of few passes over memory, because that is what they cost; comparisons and selections, which are slow
on a processor, are written as minima, maxima and magnitudes. Every operation treats a crop by itself.

Shapes: N crops of C = 3 channels, H x W pixels, values from 0 to 1; factors are (N, 1, 1, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grey
_SEXTANTS = 6  # of the colour circle


def luma(crops: Tensor) -> Tensor:
    """(N, 1, H, W), new: how bright each pixel is."""
    red, green, blue = crops.unbind(1)
    return (red * _LUMA[0]).add_(green * _LUMA[1]).add_(blue * _LUMA[2])[:, None]


def grey_(crops: Tensor) -> Tensor:
    """Three equal channels."""
    return crops.copy_(luma(crops))


def brightness_(crops: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return crops.mul_(factor).clamp_(max=1)


def contrast_(crops: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey, which PIL takes of bytes: a sum of whole numbers, so exact in any order."""
    # A row of bytes is summed exactly in float32, all rows in float64.
    rows = luma(crops).mul_(255).round_().sum(dim=-1).sum(dim=-1, dtype=torch.float64)
    mean_N1 = (rows / crops[0, 0].numel() + 0.5).floor_().float() / 255
    return _blend_(mean_N1[..., None, None], crops, factor)


def saturation_(crops: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey crop."""
    return _blend_(luma(crops), crops, factor)


def _blend_(base: Tensor, crops: Tensor, factor: Tensor) -> Tensor:
    return crops.mul_(factor).add_(base.mul_(1 - factor)).clamp_(0, 1)


def solarise_(crops: Tensor) -> Tensor:
    """Invert what is a byte of 128 or more, that is, above 0.5: what is smaller than its inverse stays."""
    return torch.minimum(crops, 1 - crops, out=crops)


def hue_(crops: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour circle by `turns`, from -0.5 to 0.5; value and saturation (of HSV) stay.

    The colours of one value and saturation lie on the edge of a hexagon, whose corners are red, yellow, green, cyan,
    blue, magenta. Ways along it are measured in sextants times the chroma, so that nothing is divided.
    """
    red, green, blue = crops.unbind(1)
    lowest = torch.minimum(red, green).minimum(blue)
    chroma = torch.maximum(red, green).maximum(blue).sub_(lowest)
    # The way from cyan, -3 to 3. While red is lowest it is blue - green; from there the excess of red counts on.
    apart, excess = blue - green, red - lowest
    way = apart.abs()
    way.add_(torch.minimum(chroma - way, excess), alpha=2).add_(excess)
    way.copysign_(apart).add_(chroma * (turns[:, 0] * _SEXTANTS))
    # A channel is empty within a sextant of the corner opposite to its own, full two sextants away, with ramps between.
    away = torch.empty_like(crops)
    for channel, opposite in enumerate((0, 2, -2)):  # cyan, magenta, yellow
        torch.add(way, chroma, alpha=-opposite, out=away[:, channel])
    chroma, lowest = chroma[:, None], lowest[:, None]
    away.abs_().sub_(chroma, alpha=3).abs_().sub_(chroma, alpha=3).abs_()  # the shorter way round
    ramp = torch.minimum(away.sub_(chroma).clamp_(min=0), chroma, out=away)
    return torch.add(ramp, lowest, out=crops)
