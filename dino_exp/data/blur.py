"""Gaussian blur of crops, each by a width of its own, as PIL does it: three times the mean over a box.

The box's sides are fractions of pixels, so that the variance is that of the Gaussian, for widths below a pixel too
(Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", SSVM 2011).

Shapes: N crops of C channels, H x W pixels; S shifts of a kernel; O output pixels of a stretch of a line, I pixels that
they are made of.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.data import threads
from dino_exp.data.crops import Floats

_PASSES = 3  # as PIL's
_NOTHING = 1e-9
_STRETCH = 32  # output pixels made by one matrix: longer ones multiply more zeros, shorter ones copy more


def kernel_reach(most_sigma: float) -> int:
    """How many neighbours on each side a blur of this width weighs."""
    return _PASSES * (int(_whole_radius(np.float64(most_sigma) ** 2 / _PASSES)) + 1)


def gaussian_kernels(sigma_N: Floats, reach: int) -> Floats:
    """(N, 1 + 2 * reach): the weights of the neighbours on each side and of a pixel itself, on the host.

    `reach` is the `kernel_reach` of the largest width.
    """
    side = reach // _PASSES
    variance_N1 = (sigma_N**2 / _PASSES)[:, None]
    whole_N1 = _whole_radius(variance_N1)
    # The outermost pixels count by a fraction, [14] there.
    fraction_N1 = (2 * whole_N1 + 1) * (whole_N1 * (whole_N1 + 1) - 3 * variance_N1)
    fraction_N1 /= 6 * (variance_N1 - (whole_N1 + 1) ** 2)
    distance_S = np.abs(np.arange(-side, side + 1))
    box_NS = np.where(distance_S <= whole_N1, 1.0, np.where(distance_S <= whole_N1 + 1, fraction_N1, 0.0))
    weights_NS = box_NS
    for _ in range(_PASSES - 1):
        padded_NS = np.pad(weights_NS, ((0, 0), (2 * side, 2 * side)))
        length = weights_NS.shape[1] + 2 * side
        weights_NS = sum(box_NS[:, at, None] * padded_NS[:, at : at + length] for at in range(2 * side + 1))
    # What no float32 sum of pixels can hold is nothing: a processor multiplies the smallest numbers very slowly.
    weights_NS[weights_NS < _NOTHING] = 0
    return np.asarray(weights_NS / weights_NS.sum(axis=-1, keepdims=True))


def _whole_radius(variance: Floats | np.float64) -> Floats:
    """The whole pixels on each side of the middle of a box of this variance, [7] and [11] there."""
    return np.asarray(np.floor((np.sqrt(12 * variance + 1) - 1) / 2))


def blur_(crops_NCHW: Tensor, kernels_NS: Tensor) -> Tensor:
    """Weigh each pixel's neighbours along lines and along columns, in place, the border repeated."""
    band_NIO = _band(kernels_NS)
    if not threads.by_parts(crops_NCHW.device):
        return crops_NCHW.copy_(_blurred(crops_NCHW, band_NIO))
    # One by one, because a product of many matrices may be computed another way for another number of them.
    for crop, band in zip(torch.split(crops_NCHW, 1), torch.split(band_NIO, 1), strict=True):
        crop.copy_(_blurred(crop, band))
    return crops_NCHW


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


def _band(kernels_NS: Tensor) -> Tensor:
    """(N, I, O): how much each input pixel counts in each output pixel of a stretch."""
    padded_NS = functional.pad(kernels_NS, (_STRETCH - 1, _STRETCH - 1))
    return padded_NS[:, _taps(kernels_NS.shape[1], kernels_NS.device)]


@functools.cache
def _taps(num: int, device: torch.device) -> Tensor:
    """(I, O): which weight of a padded kernel of `num` each is."""
    inputs, outputs = torch.arange(_STRETCH + num - 1, device=device), torch.arange(_STRETCH, device=device)
    return inputs[:, None] - outputs + _STRETCH - 1
