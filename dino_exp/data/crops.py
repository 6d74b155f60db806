"""Pieces that augmentations share: checks, random boxes, and selecting images of a batch.

Random parameters are drawn on the host, in float64, from `rng.Stream`; the images are processed in batches,
where they lie. Every operation treats an image by itself, so that a batch can be split anywhere without
changing a bit.

Shapes: B images or crops of a batch, V views, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_exp.data.images import Sizes, to_device
from dino_exp.errors import ConfigError

NUM_GLOBAL = 2
BOX_DRAWS = 22  # numbers that `random_boxes` uses: ten tries of two, and the position
_TRIES = 10

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Boxes:
    """Rectangles in whole pixels, each field an array of one shape."""

    top: Ints
    left: Ints
    height: Ints
    width: Ints

    def views(self, num: int) -> Boxes:
        """The same boxes for each of `num` views, (V, ...)."""
        return Boxes(*(np.stack([part] * num) for part in (self.top, self.left, self.height, self.width)))

    def at(self, place: int) -> Boxes:
        """Those at a place of the first axis."""
        return Boxes(self.top[place], self.left[place], self.height[place], self.width[place])


def check_ranges(**ranges: tuple[float, float]) -> None:
    """Raises ConfigError for the first range that is not 0 < low <= high."""
    for name, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise ConfigError(f"augment.{name} is [{low}, {high}]; expected 0 < low <= high")


def check_areas(*, global_area: tuple[float, float], local_area: tuple[float, float]) -> None:
    """Raises ConfigError unless both are ranges of a share of the image."""
    check_ranges(global_area=global_area, local_area=local_area)
    for name, (_, high) in {"global_area": global_area, "local_area": local_area}.items():
        if high > 1:
            raise ConfigError(f"augment.{name} ends at {high}; expected a share of the image, at most 1")


def check_probabilities(**probabilities: float) -> None:
    """Raises ConfigError for the first one outside 0 to 1."""
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"augment.{name} is {value}; expected a probability from 0 to 1")


def random_boxes(draws: Floats, sizes_B2: Sizes, *, area: tuple[float, float], ratio: tuple[float, float]) -> Boxes:
    """The boxes of RandomResizedCrop, (..., B), out of `draws`, uniform numbers of shape (..., B, BOX_DRAWS).

    `sizes_B2` are heights and widths of the images.

    Up to ten tries of an area (share of the image) and a width over height (uniform in its logarithm); when
    none fits, the largest central part of an allowed ratio. Source: torchvision's RandomResizedCrop.
    """
    tries = draws[..., : 2 * _TRIES].reshape(*draws.shape[:-1], _TRIES, 2)
    height_B, width_B = sizes_B2[:, 0], sizes_B2[:, 1]
    target = (height_B * width_B)[:, None] * between(area, tries[..., 0])
    shape = np.exp(between((np.log(ratio[0]), np.log(ratio[1])), tries[..., 1]))
    widths, heights = np.rint(np.sqrt(target * shape)), np.rint(np.sqrt(target / shape))
    fits = (widths > 0) & (widths <= width_B[:, None]) & (heights > 0) & (heights <= height_B[:, None])
    first, found = fits.argmax(axis=-1, keepdims=True), fits.any(axis=-1)
    # The largest central part: all of the height or of the width, unless its shape is not allowed.
    central_height = np.where(width_B < height_B * ratio[0], np.rint(width_B / ratio[0]), height_B)
    central_width = np.where(width_B > height_B * ratio[1], np.rint(height_B * ratio[1]), width_B)
    box_height = np.where(found, np.take_along_axis(heights, first, axis=-1)[..., 0], central_height)
    box_width = np.where(found, np.take_along_axis(widths, first, axis=-1)[..., 0], central_width)
    free_height, free_width = height_B - box_height, width_B - box_width
    top = np.where(found, np.floor(draws[..., -2] * (free_height + 1)), free_height // 2)
    left = np.where(found, np.floor(draws[..., -1] * (free_width + 1)), free_width // 2)
    return Boxes(*(part.astype(np.int64) for part in (top, left, box_height, box_width)))


def between(limits: tuple[float, float], uniform: Floats) -> Floats:
    """Numbers from 0 to 1 stretched to `limits`."""
    low, high = limits
    return low + (high - low) * uniform


def centre_squares(sizes_B2: Sizes) -> Boxes:
    """The largest central squares, (B,), of images of these heights and widths."""
    height_B, width_B = sizes_B2[:, 0], sizes_B2[:, 1]
    side_B = np.minimum(height_B, width_B)
    return Boxes((height_B - side_B) // 2, (width_B - side_B) // 2, side_B, side_B)


def to_unit(images_BCHW: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]. Raises TypeError for another type, which would be scaled twice."""
    if images_BCHW.dtype != torch.uint8:
        raise TypeError(f"expected images of uint8, found {images_BCHW.dtype}")
    return images_BCHW.float().div_(255)


@contextmanager
def products_of_float32(device: torch.device) -> Iterator[None]:
    """Products of matrices in here keep all digits of float32 on CUDA, whatever the training has chosen for its own.

    TF32 has eleven bits, and so errs by a tenth in a pixel of 255.
    """
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    chosen, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen


def host_ids(sample_ids_B: Tensor) -> Ints:
    """Numbers of samples as an array on the host, where random parameters are drawn."""
    return np.asarray(sample_ids_B.cpu().numpy(), np.int64)


def on_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """Host parameters as a float32 tensor beside the images."""
    return to_device(torch.from_numpy(np.ascontiguousarray(values, np.float32)), device)


def select(mask: NDArray[np.bool_], device: torch.device) -> Tensor | None:
    """Positions where `mask` holds, None where it never does. Known on the host: no wait for the device."""
    chosen = np.flatnonzero(mask)
    return to_device(torch.from_numpy(chosen), device) if len(chosen) else None
