"""The paper's augmentation of colour pictures, after BYOL: crop, flip, colour jitter, grey, blur, solarise.

Source: `DataAugmentationDINO` of the official code (facebookresearch/dino), which works on PIL images, one by
one. Here everything is drawn for a batch first (a plan), then crops are cut as bytes, and coloured as floats: PIL's
rounding to bytes after each of those operations is left out, except where a threshold or a mean is defined by it.

Shapes: B images of a batch, V views, N crops of one size, D draws of a crop, S shifts of a kernel, C = 3 channels, H x
W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_exp.data import threads
from dino_exp.data.blur import blur_, gaussian_kernels, kernel_reach
from dino_exp.data.colour import brightness_, contrast_, grey_, hue_, saturation_, solarise_
from dino_exp.data.crops import (
    BOX_DRAWS,
    NUM_GLOBAL,
    Boxes,
    Floats,
    Ints,
    between,
    centre_squares,
    check_areas,
    check_probabilities,
    check_ranges,
    host_ids,
    on_device,
    products_of_float32,
    random_boxes,
    to_unit,
)
from dino_exp.data.images import Images, Sizes, to_device
from dino_exp.data.resize import crop_and_resize
from dino_exp.errors import ConfigError
from dino_exp.rng import Stream

Mask = NDArray[np.bool_]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FLIP, _JITTER, _GREY, _BLUR, _RADIUS, _SOLARISE = range(BOX_DRAWS, BOX_DRAWS + 6)
_FACTORS = slice(BOX_DRAWS + 6, BOX_DRAWS + 10)
_ORDER = slice(BOX_DRAWS + 10, BOX_DRAWS + 14)
_DRAWS = BOX_DRAWS + 14
_PART_PIXELS = 224**2  # of crops that are coloured together: they and what is computed of them stay in a core's cache


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to each of N crops after it was cut, on the host.

    `factors` are those of brightness, contrast, saturation and hue; `order` (N, 4) says which of them comes first,
    second, third and last; `sigma` is the width of a blur, in pixels, and `kernels` (N, S) its weights.
    """

    flipped: Mask
    jittered: Mask
    factors: Floats
    order: Ints
    grey: Mask
    blurred: Mask
    sigma: Floats
    kernels: Floats
    solarised: Mask

    def at(self, places: Ints) -> Recipe:
        """That of some of the crops."""
        return Recipe(**{name: values[places] for name, values in vars(self).items()})


@dataclass(frozen=True)
class Plan:
    """The crops of one size: `boxes_VB` of each view and image, and a recipe for all, view by view."""

    size: int
    boxes_VB: Boxes
    recipe: Recipe


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
    _faster_way: threads.FasterWay = field(default_factory=threads.FasterWay, init=False, repr=False, compare=False)

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
        check_coloured(images)
        plans = self.plan(images.sizes_B2, host_ids(sample_ids_B), epoch)
        recipes = [plan.recipe for plan in plans]
        with products_of_float32(images.device):
            cuts = crop_and_resize(images, *((plan.boxes_VB, plan.size) for plan in plans))
            coloured = self._coloured([bytes_VBCHW.flatten(0, 1) for bytes_VBCHW in cuts], recipes)
        return [
            view
            for crops_NCHW, bytes_VBCHW in zip(coloured, cuts, strict=True)
            for view in crops_NCHW.chunk(len(bytes_VBCHW))
        ]

    def plan(self, sizes_B2: Sizes, sample_ids_B: Ints, epoch: int) -> list[Plan]:
        """All that is drawn for images of these sizes: for global crops, and for local ones if there are any."""
        views = np.arange(NUM_GLOBAL + self.num_local_crops)
        draws_VBD = Stream(self.seed, "augment.dino").uniform(
            np.int64(epoch), sample_ids_B[None, :], views[:, None], num=_DRAWS
        )
        plans = []
        for part, size, area in (
            (views[:NUM_GLOBAL], self.global_size, self.global_area),
            (views[NUM_GLOBAL:], self.local_size, self.local_area),
        ):
            if len(part):
                draws = draws_VBD[part]
                boxes = random_boxes(draws[..., :BOX_DRAWS], sizes_B2, area=area, ratio=self.ratio)
                recipe = self._recipe(draws.reshape(-1, _DRAWS), part.repeat(len(sample_ids_B)))
                plans.append(Plan(size, boxes, recipe))
        return plans

    def clean(self, images: Images) -> Tensor:
        """The undistorted central squares at the global size, normalised alike: what evaluation sees."""
        check_coloured(images)
        squares_VB = centre_squares(images.sizes_B2).views(1)
        with products_of_float32(images.device):
            (crops_VBCHW,) = crop_and_resize(images, (squares_VB, self.global_size))
        return _normalised(to_unit(crops_VBCHW[0]), self._moments(images.device))

    def _recipe(self, draws_ND: Floats, views_N: Ints) -> Recipe:
        """What is done to each crop, out of its random numbers."""
        strengths = np.array([self.brightness, self.contrast, self.saturation, self.hue])
        factors = np.array([1.0, 1.0, 1.0, 0.0]) + strengths * (2 * draws_ND[:, _FACTORS] - 1)
        factors[:, :3] = factors[:, :3].clip(min=0)
        sigma = between(self.blur_radius, draws_ND[:, _RADIUS])
        blur_probabilities = np.array(self.blur_probabilities)[views_N.clip(max=NUM_GLOBAL)]
        return Recipe(
            flipped=draws_ND[:, _FLIP] < self.flip_probability,
            jittered=draws_ND[:, _JITTER] < self.jitter_probability,
            factors=factors,
            order=draws_ND[:, _ORDER].argsort(axis=-1, kind="stable"),
            grey=draws_ND[:, _GREY] < self.grey_probability,
            blurred=draws_ND[:, _BLUR] < blur_probabilities,
            sigma=sigma,
            kernels=gaussian_kernels(sigma, kernel_reach(self.blur_radius[1])),
            solarised=(views_N == 1) & (draws_ND[:, _SOLARISE] < self.solarise_probability),
        )

    def _coloured(self, cuts: Sequence[Tensor], recipes: Sequence[Recipe]) -> list[Tensor]:
        """All that follows the crop, for the crops of each size, (N, C, H, W) bytes.

        On a processor in parts that stay in its cache and are alike.
        """
        moments = self._moments(cuts[0].device)
        if not threads.by_parts(cuts[0].device):
            return [
                _normalised(self._changed(to_unit(bytes_NCHW), recipe), moments)
                for bytes_NCHW, recipe in zip(cuts, recipes, strict=True)
            ]
        coloured = [torch.empty(bytes_NCHW.shape) for bytes_NCHW in cuts]

        def colour(part: tuple[int, Ints]) -> None:
            kind, places = part
            crops = to_unit(torch.stack([cuts[kind][index] for index in places]))
            for index, crop in zip(places, self._changed(crops, recipes[kind].at(places)), strict=True):
                _normalised(crop, moments, out=coloured[kind][index])

        parts = [
            (kind, places)
            for kind, (bytes_NCHW, recipe) in enumerate(zip(cuts, recipes, strict=True))
            for places in alike(recipe, max(_PART_PIXELS // bytes_NCHW[0, 0].numel(), 1))
        ]
        parts.sort(key=lambda part: len(part[1]) * cuts[part[0]][0].numel(), reverse=True)
        self._faster_way.work(colour, parts)
        return coloured

    def _changed(self, crops: Tensor, recipe: Recipe) -> Tensor:
        """The crops, changed in place in the official order of operations."""
        change_(crops, recipe.flipped, lambda part: part.copy_(part.flip(-1)))
        adjustments = (brightness_, contrast_, saturation_, hue_)
        for kinds in recipe.order.T:
            for kind in set(kinds[recipe.jittered].tolist()):
                mask = recipe.jittered & (kinds == kind)
                change_(crops, mask, adjustments[kind], recipe.factors[:, kind, None, None, None])
        change_(crops, recipe.grey, grey_)
        change_(crops, recipe.blurred, blur_, recipe.kernels)
        change_(crops, recipe.solarised, solarise_)
        return crops

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What is taken off each channel, and what it is divided by."""
        mean, std = (on_device(np.array(values), device)[:, None, None] for values in (self.mean, self.std))
        return mean, std


def _normalised(crops: Tensor, moments: tuple[Tensor, Tensor], out: Tensor | None = None) -> Tensor:
    mean, std = moments
    return torch.sub(crops, mean, out=out).div_(std)


def alike(recipe: Recipe, most: int) -> list[Ints]:
    """The numbers of all crops in parts of at most `most`; a part is jittered in one order, or not at all."""
    keys = np.where(recipe.jittered, recipe.order @ (4 ** np.arange(4)), -1)
    groups = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    return [group[start : start + most] for group in groups for start in range(0, len(group), most)]


def change_(crops: Tensor, mask: Mask, operation_: Callable[..., Tensor], *parameters: Floats) -> None:
    """Let an operation change the crops where `mask` holds, in place; it is given their parameters.

    On a processor one by one unless it is all of them, because a view of one is free, and a copy of some is not.
    """
    chosen, device = np.flatnonzero(mask), crops.device
    if len(chosen) == len(crops):
        operation_(crops, *(on_device(values, device) for values in parameters))
    elif not threads.by_parts(device) and len(chosen):
        places = to_device(torch.from_numpy(chosen), device)
        crops[places] = operation_(crops[places], *(on_device(values[chosen], device) for values in parameters))
    else:
        for index in chosen:
            one = slice(index, index + 1)
            operation_(crops[one], *(on_device(values[one], device) for values in parameters))


def check_coloured(images: Images) -> None:
    """Raises ConfigError for images without three channels."""
    if images.pixels_BCHW.shape[1] != 3:
        raise ConfigError(
            f"augment=dino needs images with 3 channels, and these have {images.pixels_BCHW.shape[1]}; "
            "choose another augmentation, for example augment=digits, or a data set in colour"
        )
