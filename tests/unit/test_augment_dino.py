"""The paper's colour operations: rates and ranges as measured on crops, pixels as PIL makes them."""

import threading
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from dino_exp.data import augment_dino, colour
from dino_exp.data.augment_dino import IMAGENET_MEAN, IMAGENET_STD, DinoAugment
from dino_exp.data.blur import blur_, gaussian_kernels, kernel_reach
from dino_exp.data.digits import load_digits_split
from dino_exp.data.images import Images
from dino_exp.errors import ConfigError

STILL = DinoAugment(
    seed=0,
    global_size=32,
    local_size=16,
    num_local_crops=1,
    global_area=(1.0, 1.0),
    local_area=(1.0, 1.0),
    ratio=(1.0, 1.0),
    flip_probability=0.0,
    jitter_probability=0.0,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    grey_probability=0.0,
    blur_probabilities=(0.0, 0.0, 0.0),
    blur_radius=(0.1, 2.0),
    solarise_probability=0.0,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
JITTER = replace(STILL, jitter_probability=1.0)
MANY = 2000


def picture(side: int = 32) -> Tensor:
    """A colourful picture that is not symmetric, (3, side, side) uint8, values away from 0 and 255."""
    y, x = np.mgrid[:side, :side] / side
    planes = [60 + 120 * x, 200 - 150 * y, 90 + 60 * np.sin(9 * x + 5 * y)]
    return torch.from_numpy(np.stack(planes).astype(np.uint8))


def crops_of(augment: DinoAugment, num: int = MANY, image: Tensor | None = None) -> list[Tensor]:
    pixels = (picture() if image is None else image).expand(num, 3, 32, 32).contiguous()
    return augment(Images.whole(pixels), torch.arange(num), 0)


def share(condition: Tensor) -> float:
    return float(condition.double().mean())


def changed(crops: Tensor) -> Tensor:
    return (crops - picture() / 255).abs().amax(dim=(1, 2, 3)) > 1e-3


def test_switched_off_it_only_resizes() -> None:
    first, second, local = crops_of(STILL, num=3)
    assert torch.allclose(first, STILL.clean(Images.whole(picture().expand(3, 3, 32, 32).contiguous())), atol=1e-6)
    assert torch.equal(first, second)
    assert torch.allclose(first[0], picture() / 255, atol=1e-6)
    assert local.shape == (3, 3, 16, 16)


def test_mean_and_std_are_applied_last() -> None:
    plain = crops_of(STILL, num=1)[0][0]
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    normalised = crops_of(replace(STILL, mean=IMAGENET_MEAN, std=IMAGENET_STD), num=1)[0][0]
    assert torch.allclose(normalised, (plain - mean[:, None, None]) / std[:, None, None], atol=1e-6)


def test_half_of_the_crops_are_mirrored() -> None:
    crops = crops_of(replace(STILL, flip_probability=0.5))[0]
    mirrored = changed(crops)
    assert abs(share(mirrored) - 0.5) < 0.04
    assert torch.allclose(crops[mirrored][0], (picture() / 255).flip(-1), atol=1e-6)


def test_grey_and_jitter_have_their_rates() -> None:
    crops = crops_of(replace(STILL, grey_probability=0.2))[0]
    grey = (crops[:, 0] == crops[:, 1]).flatten(1).all(1) & (crops[:, 1] == crops[:, 2]).flatten(1).all(1)
    assert abs(share(grey) - 0.2) < 0.03
    jittered = crops_of(replace(STILL, jitter_probability=0.8, brightness=0.4))[0]
    assert abs(share(changed(jittered)) - 0.8) < 0.03


def test_blur_has_a_rate_for_each_kind_of_crop() -> None:
    augment = replace(STILL, blur_probabilities=(1.0, 0.1, 0.5), blur_radius=(1.0, 2.0), local_size=32)
    first, second, local = (share(changed(crops)) for crops in crops_of(augment))
    assert first == 1
    assert abs(second - 0.1) < 0.02
    assert abs(local - 0.5) < 0.04


def test_only_the_second_global_crop_is_solarised() -> None:
    augment = replace(STILL, solarise_probability=0.2, local_size=32)
    first, second, local = (share(changed(crops)) for crops in crops_of(augment))
    assert (first, local) == (0, 0)
    assert abs(second - 0.2) < 0.03


def test_jitter_strengths_span_their_ranges() -> None:
    image = torch.full((3, 32, 32), 100, dtype=torch.uint8)
    factor = crops_of(replace(JITTER, brightness=0.4), image=image)[0][:, 0, 0, 0] / (100 / 255)
    assert 0.6 <= float(factor.min()) < 0.61
    assert 1.39 < float(factor.max()) <= 1.4001
    assert abs(float(factor.median()) - 1) < 0.03


def test_the_four_jitters_come_in_every_order() -> None:
    augment = replace(JITTER, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    orders = defaultdict(list)  # of each thread, which does all for a crop

    def noted(name: str, plain: object) -> object:
        def adjust(crops: Tensor, factor: Tensor) -> Tensor:
            orders[threading.get_ident()].append(name)
            return plain(crops, factor)  # type: ignore[operator, no-any-return]

        return adjust

    with pytest.MonkeyPatch.context() as patch:
        for name in ("brightness_", "contrast_", "saturation_", "hue_"):
            patch.setattr(augment_dino, name, noted(name, getattr(augment_dino, name)))
        for sample in range(200):
            augment(Images.whole(picture()[None]), torch.tensor([sample]), 0)
    jitters_of_a_crop = {
        tuple(names[start : start + 4]) for names in orders.values() for start in range(0, len(names), 4)
    }
    assert len(jitters_of_a_crop) == 24


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()


def applied(operation: object, factor: float) -> Tensor:
    crops = (picture() / 255)[None]
    return 255 * operation(crops, torch.tensor([factor])[:, None, None, None])[0]  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.0, 1.2, 1.4])
def test_brightness_contrast_and_saturation_are_those_of_pil(factor: float) -> None:
    pairs = [
        (colour.brightness_, ImageEnhance.Brightness),
        (colour.contrast_, ImageEnhance.Contrast),
        (colour.saturation_, ImageEnhance.Color),
    ]
    for ours, theirs in pairs:
        expected = from_pil(theirs(as_pil(picture())).enhance(factor))
        assert float((applied(ours, factor) - expected).abs().max()) < 1.1


def test_grey_and_solarise_are_those_of_pil() -> None:
    unit = (picture() / 255)[None]
    grey = from_pil(as_pil(picture()).convert("L").convert("RGB"))
    assert float((255 * colour.luma(unit)[0] - grey).abs().max()) < 1.1
    assert torch.allclose(255 * colour.solarise_(unit)[0], from_pil(ImageOps.solarize(as_pil(picture()))), atol=1e-3)


@pytest.mark.parametrize("turns", [-0.1, 0.03, 0.1])
def test_hue_is_turned_as_pil_does_but_for_its_rounding(turns: float) -> None:
    hue, saturation, value = as_pil(picture()).convert("HSV").split()
    turned = hue.point(lambda h: (h + round(255 * turns)) % 256)
    expected = from_pil(Image.merge("HSV", (turned, saturation, value)).convert("RGB"))
    assert float((applied(colour.hue_, turns) - expected).abs().mean()) < 1.5
    assert torch.allclose(applied(colour.hue_, 0.0), picture().float(), atol=1e-3)


def blurred(crops: Tensor, radius: float) -> Tensor:
    kernels = gaussian_kernels(np.full(len(crops), radius), reach=kernel_reach(2.0))
    return blur_(crops.clone(), torch.from_numpy(kernels).float())


@pytest.mark.parametrize("radius", [0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 1.5, 2.0])
def test_blur_is_that_of_pil(radius: float) -> None:
    crops = blurred((picture() / 255)[None], radius)
    expected = from_pil(as_pil(picture()).filter(ImageFilter.GaussianBlur(radius)))
    difference = (255 * crops[0] - expected).abs()
    # PIL rounds to whole levels after each of its passes, and repeats the border before each.
    assert float(difference[:, 6:-6, 6:-6].max()) < 2
    assert float(difference.mean()) < 1.5
    dot = torch.zeros(1, 1, 32, 32)
    dot[..., 16, 16] = 1
    spread = blurred(dot, radius)[0, 0]
    variance = float((spread.sum(0) * (torch.arange(32) - 16) ** 2).sum())
    assert abs(float(spread.sum()) - 1) < 1e-5
    assert abs(variance - radius**2) < 1e-4 * radius**2 + 1e-6


@pytest.mark.parametrize("largest", [0.1, 0.9, 1.0, 2.0, 5.0, 17.3])
def test_no_weight_of_a_blur_is_cut_off(largest: float) -> None:
    sigma = np.linspace(0.05, largest, 50)
    kernels, wider = (gaussian_kernels(sigma, reach) for reach in (kernel_reach(largest), kernel_reach(largest) + 3))
    assert np.allclose(np.pad(kernels, ((0, 0), (3, 3))), wider, rtol=1e-12, atol=0)


def test_crops_cover_the_areas_asked_for() -> None:
    """Read off a ramp whose value is the position in the picture."""
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(3, 32, 32)
    first, _, local = crops_of(replace(STILL, global_area=(0.4, 1.0), local_area=(0.05, 0.4)), image=ramp)
    for crops, low, high in ((first, 0.4, 1.0), (local, 0.05, 0.4)):
        width = (crops[:, 0, 8, -2] - crops[:, 0, 8, 1]) * 255 / 8 / 32 * crops.shape[-1] / (crops.shape[-1] - 3)
        area = width**2
        assert low - 0.06 < float(area.min()) < low + 0.06
        assert high - 0.06 < float(area.max()) < high + 0.06
        assert abs(float(area.median()) - (low + high) / 2) < 0.06


def test_grey_data_is_refused() -> None:
    images = load_digits_split("val").images(np.arange(2))
    with pytest.raises(ConfigError, match=r"augment=dino needs images with 3 channels, and these have 1"):
        STILL(images, torch.arange(2), 0)
    with pytest.raises(ConfigError, match="augment=digits"):
        STILL.clean(images)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hue": 0.6}, "augment.hue is 0.6"),
        ({"blur_probabilities": (1.0, 1.1, 0.5)}, r"augment.blur_probabilities\[1\] is 1.1"),
        ({"blur_radius": (0.0, 2.0)}, "augment.blur_radius"),
        ({"global_area": (0.4, 1.1)}, "augment.global_area"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        replace(STILL, **wrong)  # type: ignore[arg-type]
