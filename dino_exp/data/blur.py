"""Gaussian blur of a crop, by a width of its own.

Shapes: N crops of C channels, H x W pixels; O output pixels of a stretch of a line, I pixels that they are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.data.resize import sum_last

_STRETCH = 32  # output pixels made by one matrix: longer ones multiply more zeros, shorter ones copy more


def gaussian_blur(crops_NCHW: Tensor, sigma_N: Tensor, reach: int) -> Tensor:
    """Blurred by `sigma_N` pixels over `reach` neighbours on each side, the border repeated."""
    band_NIO = _band(sigma_N, reach)
    if crops_NCHW.is_cuda:
        return _blurred(crops_NCHW, band_NIO)
    # One by one, because a product of many matrices may be computed another way for another number of them.
    parts = zip(torch.split(crops_NCHW, 1), torch.split(band_NIO, 1), strict=True)
    return torch.cat([_blurred(crop, band) for crop, band in parts])


def _blurred(crops_NCHW: Tensor, band_NIO: Tensor) -> Tensor:
    """Two products with the same band of weights, one along lines, one along columns, stretch by stretch."""
    num, channels, height, width = crops_NCHW.shape
    span = band_NIO.shape[1]
    reach = (span - _STRETCH) // 2
    padded = functional.pad(crops_NCHW, (reach, reach + -width % _STRETCH, 0, 0), mode="replicate")
    lines_NLI = padded.unfold(-1, span, _STRETCH).reshape(num, -1, span)
    across = (lines_NLI @ band_NIO).view(num, channels, height, -1)[..., :width]
    padded = functional.pad(across, (0, 0, reach, reach + -height % _STRETCH), mode="replicate")
    columns_NSIW = padded.unfold(-2, span, _STRETCH).transpose(-1, -2).reshape(num, -1, span, width)
    return (band_NIO.transpose(1, 2)[:, None] @ columns_NSIW).view(num, channels, -1, width)[..., :height, :]


def _band(sigma_N: Tensor, reach: int) -> Tensor:
    """(N, I, O): how much each input pixel counts in each output pixel of a stretch."""
    device = sigma_N.device
    shifts_1S = torch.arange(-reach, reach + 1, device=device)[None]
    weights_NS = torch.exp(-0.5 * (shifts_1S / sigma_N[:, None]) ** 2)
    padded_NS = functional.pad(weights_NS / sum_last(weights_NS), (_STRETCH - 1, _STRETCH - 1))
    taps_IO = torch.arange(_STRETCH + 2 * reach, device=device)[:, None] - torch.arange(_STRETCH, device=device)
    return padded_NS[:, taps_IO + _STRETCH - 1]
