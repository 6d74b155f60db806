"""What the digits' distortions do, each measured with the others switched off."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_exp.data.augment_digits import INK_MEAN, INK_STD, DigitsAugment
from dino_exp.data.digits import load_digits_split
from dino_exp.data.images import Images
from dino_exp.errors import ConfigError

STILL = DigitsAugment(
    seed=0,
    global_size=16,
    local_size=8,
    num_local_crops=4,
    global_area=(1.0, 1.0),
    local_area=(1.0, 1.0),
    ratio=(1.0, 1.0),
    max_rotation_degrees=0.0,
    blur_probability=0.0,
    max_gain=0.0,
    noise_std=0.0,
)
FULL = replace(STILL, global_area=(0.65, 1.0), local_area=(0.4, 0.8), ratio=(0.8, 1.25))
MANY = 4000


def ink(crops: Tensor) -> Tensor:
    return crops * INK_STD + INK_MEAN


def on_picture(augment: DigitsAugment, picture: Tensor, num: int = MANY) -> list[Tensor]:
    images = Images.whole(picture.to(torch.uint8).expand(num, 1, 8, 8).contiguous())
    return [ink(crop) for crop in augment(images, torch.arange(num), 0)]


def test_without_distortions_crops_are_the_clean_view() -> None:
    images = load_digits_split("val").images(np.arange(10))
    crops = STILL(images, torch.arange(10), 0)
    assert torch.allclose(crops[0], STILL.clean(images), atol=1e-5)
    assert torch.allclose(ink(crops[2]), images.pixels_BCHW / 255, atol=1e-5)


def test_normalised_pixels_are_centred() -> None:
    dataset = load_digits_split("train")
    small = replace(STILL, global_size=8).clean(dataset.images(np.arange(len(dataset))))
    assert abs(float(small.mean())) < 1e-3
    assert abs(float(small.std()) - 1) < 1e-3


def ramps() -> tuple[Tensor, Tensor]:
    """Pictures whose ink tells where a crop looks: from left to right and from top to bottom."""
    across = (torch.arange(8) * 30).expand(8, 8)
    return across, across.T


def spans(augment: DigitsAugment) -> tuple[Tensor, Tensor]:
    """Width and height, as shares, of the first global crops; read off the slopes inside the ramps."""
    across, down = (on_picture(augment, ramp)[0][:, 0] for ramp in ramps())
    step = 30 / 255 * 8 / 16  # ink between neighbouring points of a crop of the whole picture
    return (
        (across[:, 8, 9] - across[:, 8, 7]) / (2 * step),
        (down[:, 9, 8] - down[:, 7, 8]) / (2 * step),
    )


def test_areas_and_ratios_are_those_asked_for() -> None:
    width, height = spans(FULL)
    area, ratio = width * height, width / height
    assert 0.64 < float(area.min()) < 0.67
    assert 0.97 < float(area.max()) < 1.01
    # A box wider or higher than the picture is cut to it, so large areas come out a little smaller.
    assert 0.79 < float(area.median()) < 0.84
    assert 0.78 < float(ratio.min()) < 0.82
    assert 1.22 < float(ratio.max()) < 1.27
    assert abs(math.log(float(ratio.median()))) < 0.02


def test_rotations_are_uniform_up_to_the_limit() -> None:
    across = on_picture(replace(STILL, max_rotation_degrees=15.0), ramps()[0])[0][:, 0]
    slope_x, slope_y = across[:, 8, 9] - across[:, 8, 7], across[:, 9, 8] - across[:, 7, 8]
    degrees = torch.rad2deg(torch.atan2(-slope_y, slope_x))
    assert 14.8 < float(degrees.max()) < 15.1
    assert -15.1 < float(degrees.min()) < -14.8
    assert abs(float(degrees.mean())) < 0.6
    assert abs(float(degrees.abs().median()) - 7.5) < 0.4


def test_blur_gain_and_noise_have_their_rates_and_sizes() -> None:
    dot = torch.zeros(8, 8)
    dot[4, 4] = 255
    local = on_picture(replace(STILL, blur_probability=0.2), dot)[2][:, 0, 4, 4]
    assert abs(float((local < 0.5).double().mean()) - 0.2) < 0.02
    grey = torch.full((8, 8), 100)
    gain = on_picture(replace(STILL, max_gain=0.2), grey)[2][:, 0, 4, 4] / (100 / 255)
    assert 0.8 <= float(gain.min()) < 0.805
    assert 1.195 < float(gain.max()) <= 1.2001
    noise = on_picture(replace(STILL, noise_std=0.03), grey)[2] - 100 / 255
    assert abs(float(noise.std()) - 0.03) < 1e-3
    assert abs(float(noise.mean())) < 1e-3


def test_blur_keeps_even_areas_and_total_ink() -> None:
    blurred = replace(STILL, blur_probability=1.0)
    even = on_picture(blurred, torch.full((8, 8), 200), num=1)[2]
    assert torch.allclose(even, torch.full_like(even, 200 / 255), atol=1e-5)
    dot = torch.zeros(8, 8)
    dot[4, 4] = 255
    assert abs(float(on_picture(blurred, dot, num=1)[2].sum()) - 1) < 1e-5


def test_nothing_is_ever_mirrored() -> None:
    corner = torch.zeros(8, 8)
    corner[1:3, 1:3] = 255
    for crops in on_picture(replace(FULL, max_rotation_degrees=15.0), corner, num=500)[:2]:
        place = torch.arange(crops.shape[-1]) - (crops.shape[-1] - 1) / 2
        assert bool(((crops[:, 0].sum(1) * place).sum(1) < 0).all())
        assert bool(((crops[:, 0].sum(2) * place).sum(1) < 0).all())


@pytest.mark.parametrize(
    "wrong",
    [
        {"global_area": (0.0, 1.0)},
        {"local_area": (0.4, 1.2)},
        {"ratio": (1.2, 0.8)},
        {"blur_probability": 1.5},
        {"noise_std": -0.1},
        {"num_local_crops": -1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}"):
        replace(STILL, **wrong)  # type: ignore[arg-type]
