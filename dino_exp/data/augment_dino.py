"""The paper's augmentation of colour pictures, after BYOL: crop, flip, colour jitter, grey, blur, solarise.

Source: `DataAugmentationDINO` of the official code (facebookresearch/dino), which works on PIL images, one by
one. The same operations here run on batches of float images; PIL's rounding to bytes between them is left
out, except where a threshold or a mean is defined by it.

Shapes: B crops of a batch, V views, C = 3 channels, H x W pixels, S shifts of a blur kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.data.crops import (
    BOX_DRAWS,
    NUM_GLOBAL,
    Floats,
    between,
    centre_squares,
    check_areas,
    check_probabilities,
    check_ranges,
    crop_and_resize,
    host_ids,
    on_device,
    random_boxes,
    select,
    sum_last,
    to_unit,
)
from dino_exp.data.images import Images, Sizes
from dino_exp.errors import ConfigError
from dino_exp.rng import Stream

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grey
_FLIP, _JITTER, _GREY, _BLUR, _RADIUS, _SOLARISE = range(BOX_DRAWS, BOX_DRAWS + 6)
_FACTORS = slice(BOX_DRAWS + 6, BOX_DRAWS + 10)
_ORDER = slice(BOX_DRAWS + 10, BOX_DRAWS + 14)
_DRAWS = BOX_DRAWS + 14
_KERNEL_STDS = 3  # the Gaussian is cut off there


@dataclass(frozen=True, kw_only=True)
class DinoAugment:
    """Two global and `num_local_crops` local crops of every image; areas are shares of the image.

    Called with colour images, their numbers in the data set and the epoch; returns the crops,
    global ones first, each (B, 3, size, size) float32 and normalised. A pure function of (seed, epoch, image,
    crop). `blur_probabilities` are those of the first global, the second global and the local crops;
    `blur_radius` is the range of the standard deviation, in pixels; only the second global crop is solarised.
    """

    seed: int
    global_size: int
    local_size: int
    num_local_crops: int
    global_area: tuple[float, float]
    local_area: tuple[float, float]
    ratio: tuple[float, float]
    flip_probability: float
    jitter_probability: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grey_probability: float
    blur_probabilities: tuple[float, float, float]
    blur_radius: tuple[float, float]
    solarise_probability: float
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_areas(global_area=self.global_area, local_area=self.local_area)
        check_ranges(ratio=self.ratio, blur_radius=self.blur_radius)
        check_probabilities(
            flip_probability=self.flip_probability,
            jitter_probability=self.jitter_probability,
            grey_probability=self.grey_probability,
            solarise_probability=self.solarise_probability,
            **{f"blur_probabilities[{place}]": value for place, value in enumerate(self.blur_probabilities)},
        )
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"augment.hue is {self.hue}; expected turns of the colour circle, from 0 to 0.5")

    def __call__(self, images: Images, sample_ids_B: Tensor, epoch: int) -> list[Tensor]:
        """The crops of a batch. Raises ConfigError for images without three channels."""
        ids, unit_BCHW = host_ids(sample_ids_B), to_unit(_coloured(images))
        crops: list[Tensor] = []
        for view in range(NUM_GLOBAL + self.num_local_crops):
            draws = Stream(self.seed, "augment.dino").uniform(epoch, ids, view, num=_DRAWS)
            crops.append(self._view(unit_BCHW, images.sizes_B2, draws, view))
        return crops

    def clean(self, images: Images) -> Tensor:
        """The undistorted central squares at the global size, normalised alike: what evaluation sees."""
        boxes = centre_squares(images.sizes_B2)
        return self._normalised(crop_and_resize(to_unit(_coloured(images)), boxes, self.global_size))

    def _view(self, unit_BCHW: Tensor, sizes_B2: Sizes, draws: Floats, view: int) -> Tensor:
        """One crop of each image, in the official order of operations."""
        is_global = view < NUM_GLOBAL
        area = self.global_area if is_global else self.local_area
        boxes = random_boxes(draws[:, :BOX_DRAWS], sizes_B2, area=area, ratio=self.ratio)
        crops = crop_and_resize(unit_BCHW, boxes, self.global_size if is_global else self.local_size)
        device = crops.device
        if (chosen := select(draws[:, _FLIP] < self.flip_probability, device)) is not None:
            crops[chosen] = crops[chosen].flip(-1)
        self._jitter(crops, draws)
        if (chosen := select(draws[:, _GREY] < self.grey_probability, device)) is not None:
            crops[chosen] = grey(crops[chosen]).expand(-1, 3, -1, -1)
        self._blur(crops, draws, self.blur_probabilities[min(view, NUM_GLOBAL)])
        if view == 1 and (chosen := select(draws[:, _SOLARISE] < self.solarise_probability, device)) is not None:
            crops[chosen] = solarise(crops[chosen])
        return self._normalised(crops)

    def _jitter(self, crops: Tensor, draws: Floats) -> None:
        """Brightness, contrast, saturation and hue in place, each crop in an order of its own."""
        strengths = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        centre = np.array([1.0, 1.0, 1.0, 0.0])
        factors = centre + strengths * (2 * draws[:, _FACTORS] - 1)
        factors[:, :3] = factors[:, :3].clip(min=0)
        order = draws[:, _ORDER].argsort(axis=-1, kind="stable")
        jittered = draws[:, _JITTER] < self.jitter_probability
        for place in range(len(strengths)):
            for kind, adjust in enumerate((brightness, contrast, saturation, hue)):
                mask = jittered & (order[:, place] == kind)
                if (chosen := select(mask, crops.device)) is not None:
                    factor = on_device(factors[mask, kind], crops.device)[:, None, None, None]
                    crops[chosen] = adjust(crops[chosen], factor)

    def _blur(self, crops: Tensor, draws: Floats, probability: float) -> None:
        mask = draws[:, _BLUR] < probability
        if (chosen := select(mask, crops.device)) is not None:
            sigma = on_device(between(self.blur_radius, draws[mask, _RADIUS]), crops.device)
            reach = math.ceil(_KERNEL_STDS * self.blur_radius[1])
            crops[chosen] = gaussian_blur(crops[chosen], sigma, reach=reach)

    def _normalised(self, crops: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=crops.device)[:, None, None] for values in (self.mean, self.std))
        return (crops - mean) / std


def grey(crops: Tensor) -> Tensor:
    """(B, 1, H, W): the luma of each pixel."""
    red, green, blue = crops.unbind(1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2])[:, None]


def brightness(crops: Tensor, factor: Tensor) -> Tensor:
    """Blend with black."""
    return (crops * factor).clamp(0, 1)


def contrast(crops: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean grey, which PIL takes of bytes: a sum of whole numbers, so exact in any order."""
    bytes_B = (grey(crops) * 255).round().long().sum(dim=(1, 2, 3))
    mean_B = (bytes_B.double() / crops[0, 0].numel() + 0.5).floor().float() / 255
    return _blend(mean_B[:, None, None, None], crops, factor)


def saturation(crops: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image."""
    return _blend(grey(crops), crops, factor)


def hue(crops: Tensor, factor: Tensor) -> Tensor:
    """Turn the colour circle by `factor` turns."""
    # Imported here because it takes a quarter of a second, and the digits do without.
    from kornia.enhance import adjust_hue

    turned: Tensor = adjust_hue(crops, factor.flatten() * (2 * math.pi))
    return turned


def solarise(crops: Tensor) -> Tensor:
    """Invert what is a byte of 128 or more, that is, 0.5 and above before rounding."""
    return torch.where(crops >= 0.5, 1 - crops, crops)


def gaussian_blur(crops: Tensor, sigma_B: Tensor, reach: int) -> Tensor:
    """Gaussian blur by `sigma_B` pixels over `reach` neighbours on each side, the border repeated."""
    shifts_1S = torch.arange(-reach, reach + 1, device=crops.device)[None]
    weights_BS = torch.exp(-0.5 * (shifts_1S / sigma_B[:, None]) ** 2)
    weights_SB111 = (weights_BS / sum_last(weights_BS)).T[..., None, None, None]
    for axis, border in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        padded, side = functional.pad(crops, border, mode="replicate"), crops.shape[axis]
        # Sums of shifted images: a convolution may be computed another way for another batch size.
        crops = sum(
            (weight * padded.narrow(axis, shift, side) for shift, weight in enumerate(weights_SB111)),
            torch.zeros_like(crops),
        )
    return crops


def _blend(base: Tensor, crops: Tensor, factor: Tensor) -> Tensor:
    return (base + factor * (crops - base)).clamp(0, 1)


def _coloured(images: Images) -> Tensor:
    if images.pixels_BCHW.shape[1] != 3:
        raise ConfigError(
            f"augment=dino needs images with 3 channels, and these have {images.pixels_BCHW.shape[1]}; "
            "choose another augmentation, for example augment=digits, or a data set in colour"
        )
    return images.pixels_BCHW
