"""Crops of small handwritten digits: one affine sampling for each resolution, a little blur, gain and noise.

Never flipped: a mirrored digit is another sign. Shapes: B images, V views, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.data.crops import (
    NUM_GLOBAL,
    Floats,
    between,
    check_areas,
    check_probabilities,
    check_ranges,
    host_ids,
    on_device,
    select,
    to_unit,
)
from dino_exp.data.images import Images
from dino_exp.errors import ConfigError
from dino_exp.rng import Stream

INK_MEAN, INK_STD = 0.3054, 0.3761  # of the 1,437 training digits, ink from 0 to 1
_DRAWS = 8


@dataclass(frozen=True, kw_only=True)
class DigitsAugment:
    """Two global and `num_local_crops` local crops of every image; areas are shares of the image.

    Called with images of one size, their numbers in the data set and the epoch; returns the crops,
    global ones first, each (B, C, size, size) float32 and normalised. A pure function of (seed, epoch, image,
    crop).
    """

    seed: int
    global_size: int
    local_size: int
    num_local_crops: int
    global_area: tuple[float, float]
    local_area: tuple[float, float]
    ratio: tuple[float, float]
    max_rotation_degrees: float
    blur_probability: float
    max_gain: float
    noise_std: float

    def __post_init__(self) -> None:
        check_areas(global_area=self.global_area, local_area=self.local_area)
        check_ranges(ratio=self.ratio)
        check_probabilities(blur_probability=self.blur_probability)
        if min(self.max_rotation_degrees, self.max_gain, self.noise_std, self.num_local_crops) < 0:
            raise ConfigError(
                "augment.max_rotation_degrees, max_gain, noise_std and num_local_crops are "
                f"{self.max_rotation_degrees}, {self.max_gain}, {self.noise_std} and {self.num_local_crops}; "
                "expected 0 or more"
            )

    def __call__(self, images: Images, sample_ids_B: Tensor, epoch: int) -> list[Tensor]:
        """The crops of a batch. Raises ConfigError for images of several sizes."""
        ids, unit_BCHW = host_ids(sample_ids_B), to_unit(_whole(images))
        crops = self._views(unit_BCHW, ids, epoch, range(NUM_GLOBAL), self.global_size, self.global_area)
        if self.num_local_crops:
            local = range(NUM_GLOBAL, NUM_GLOBAL + self.num_local_crops)
            crops += self._views(unit_BCHW, ids, epoch, local, self.local_size, self.local_area)
        return crops

    def clean(self, images: Images) -> Tensor:
        """The undistorted images at the global size, normalised alike: what evaluation sees."""
        num = len(images)
        whole = np.tile([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], (num, 1, 1))
        return _normalised(_sample(to_unit(_whole(images)), whole, self.global_size))

    def _views(
        self,
        unit_BCHW: Tensor,
        ids: np.ndarray,
        epoch: int,
        views: range,
        size: int,
        area: tuple[float, float],
    ) -> list[Tensor]:
        """The crops numbered `views`, made together as one batch of V x B, view by view."""
        index = (np.int64(epoch), ids[None, :], np.array(views)[:, None])
        draws = Stream(self.seed, "augment.digits").uniform(*index, num=_DRAWS).reshape(-1, _DRAWS)
        crops = _sample(unit_BCHW.repeat(len(views), 1, 1, 1), self._affine(draws, area), size)
        blurred = select(draws[:, 5] < self.blur_probability, crops.device)
        if blurred is not None:
            crops[blurred] = _blur(crops[blurred])
        gain = on_device(1 + self.max_gain * (2 * draws[:, 6] - 1), crops.device)
        crops *= gain[:, None, None, None]
        if self.noise_std:
            noise = Stream(self.seed, "augment.digits.noise").normal(*index, num=crops[0].numel())
            crops += on_device(self.noise_std * noise, crops.device).view_as(crops)
        return list(_normalised(crops).chunk(len(views)))

    def _affine(self, draws: Floats, area: tuple[float, float]) -> Floats:
        """(B, 2, 3) maps from crop to image coordinates, both -1 to 1: box, position inside, rotation."""
        share = between(area, draws[:, 0])
        shape = np.exp(between((np.log(self.ratio[0]), np.log(self.ratio[1])), draws[:, 1]))
        width, height = np.minimum(np.sqrt(share * shape), 1), np.minimum(np.sqrt(share / shape), 1)
        x, y = (1 - width) * (2 * draws[:, 2] - 1), (1 - height) * (2 * draws[:, 3] - 1)
        angle = math.radians(self.max_rotation_degrees) * (2 * draws[:, 4] - 1)
        cos, sin = np.cos(angle), np.sin(angle)
        rows = [width * cos, -height * sin, x, width * sin, height * cos, y]
        return np.stack(rows, axis=-1).reshape(-1, 2, 3)


def _whole(images: Images) -> Tensor:
    if not images.fill_canvas:
        raise ConfigError(
            "augment=digits needs images of one size, and these differ; choose another augmentation, for example "
            "augment=dino"
        )
    return images.pixels_BCHW


def _sample(images_BCHW: Tensor, affine_B23: Floats, size: int) -> Tensor:
    """Bilinear sampling at `size` x `size` points of each crop; outside of the image its edge is repeated."""
    a = on_device(affine_B23, images_BCHW.device)[..., None, None]
    centres = (torch.arange(size, device=images_BCHW.device, dtype=torch.float32) * 2 + 1) / size - 1
    x_1W, y_H1 = centres[None, :], centres[:, None]
    # Written out because a matrix product may round differently for another batch size.
    grid = torch.stack(
        [a[:, row, 0] * x_1W + a[:, row, 1] * y_H1 + a[:, row, 2] for row in range(2)],
        dim=-1,
    )
    return functional.grid_sample(images_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(crops_BCHW: Tensor) -> Tensor:
    """Binomial 3 x 3 blur, the border repeated."""
    padded = functional.pad(crops_BCHW, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., :-2] + padded[..., 2:]) * 0.25 + padded[..., 1:-1] * 0.5
    return (across[..., :-2, :] + across[..., 2:, :]) * 0.25 + across[..., 1:-1, :] * 0.5


def _normalised(crops_BCHW: Tensor) -> Tensor:
    return (crops_BCHW - INK_MEAN) / INK_STD
