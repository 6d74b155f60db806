"""The paper's augmentation as a distribution: what is drawn has the published rates, ranges and independence.

Read off the plan, which the crops follow (`test_augment_dino.py` looks at pixels), for images of several sizes at once.
All bounds are six standard deviations or more of what 20,000 images would show, and far below any wrong rate.
"""

import math
from functools import cache
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_exp.data.augment_dino import DinoAugment, Plan, Recipe
from dino_exp.data.crops import Boxes
from tests.unit.test_augment_purity import DINO

PUBLISHED = DINO  # its rates are those of the official code; its sizes do not matter here
NUM = 20_000
SIGMAS = 6
SIZES = np.array([[375, 500], [500, 375], [224, 224], [90, 400]])  # the last too long for most global boxes
FITTING = SIZES[:3]
RATIO = (3 / 4, 4 / 3)


@cache
def plans(epoch: int = 0) -> list[Plan]:
    sizes_B2 = SIZES[np.arange(NUM) % len(SIZES)]
    return PUBLISHED.plan(sizes_B2, np.arange(NUM), epoch)


def recipe_of(view: int) -> Recipe:
    """That of one view: 0 and 1 are global, the others local."""
    plan = plans()[view > 1]
    start = (view if view < 2 else view - 2) * NUM
    return plan.recipe.at(np.arange(start, start + NUM))


def boxes_of(view: int, size: int) -> Boxes:
    """Those of the images of one size."""
    boxes = plans()[view > 1].boxes_VB.at(view if view < 2 else view - 2)
    return Boxes(*(part[size :: len(SIZES)] for part in (boxes.top, boxes.left, boxes.height, boxes.width)))


def check_rate(drawn: NDArray[np.bool_], rate: float) -> None:
    assert abs(drawn.mean() - rate) <= SIGMAS * math.sqrt(rate * (1 - rate) / len(drawn))


def check_uniform(values: NDArray[np.float64], low: float, high: float, slack: float = 0.0) -> None:
    """The largest distance of the distribution from a uniform one (Kolmogorov and Smirnov)."""
    ordered = np.sort(values)
    expected = ((ordered - low) / (high - low)).clip(0, 1)
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(expected - steps[:-1]).max(), np.abs(expected - steps[1:]).max())
    assert distance < 2.5 / math.sqrt(len(values)) + slack  # by chance 7 times in a million
    assert low - slack * (high - low) <= ordered[0]
    assert ordered[-1] <= high + slack * (high - low)


@pytest.mark.parametrize(("view", "blurred", "solarised"), [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0), (3, 0.5, 0.0)])
def test_every_view_has_its_rates(view: int, blurred: float, solarised: float) -> None:
    recipe = recipe_of(view)
    check_rate(recipe.flipped, 0.5)
    check_rate(recipe.jittered, 0.8)
    check_rate(recipe.grey, 0.2)
    check_rate(recipe.blurred, blurred)
    check_rate(recipe.solarised, solarised)


@pytest.mark.parametrize("view", range(4))
def test_strengths_and_radii_are_uniform_in_their_ranges(view: int) -> None:
    recipe = recipe_of(view)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]  # brightness, contrast, saturation, hue
    for factor, (low, high) in zip(recipe.factors.T, ranges, strict=True):
        check_uniform(factor, low, high)
    check_uniform(recipe.sigma, 0.1, 2.0)


@pytest.mark.parametrize("view", range(4))
def test_the_24_orders_of_the_jitters_are_equally_frequent(view: int) -> None:
    found, counts = np.unique(recipe_of(view).order, axis=0, return_counts=True)
    assert {tuple(order) for order in found.tolist()} == set(permutations(range(4)))
    expected = NUM / 24
    assert np.abs(counts - expected).max() < SIGMAS * math.sqrt(expected)


def test_nothing_that_is_drawn_tells_anything_about_the_rest() -> None:
    """Neither within a crop, nor between crops, nor between epochs. Of images of one size, which decides on areas."""
    columns: list[NDArray[np.generic]] = []
    images = slice(None, None, len(SIZES))
    for view in range(4):
        recipe, boxes = recipe_of(view).at(np.arange(NUM)[images]), boxes_of(view, 0)
        columns += [recipe.flipped, recipe.jittered, recipe.grey, *recipe.factors.T, recipe.sigma, recipe.order[:, 0]]
        columns += [recipe.blurred] if view else []
        columns += [recipe.solarised] if view == 1 else []
        columns += [boxes.height * boxes.width]
    later = plans(epoch=1)[0].recipe.at(np.arange(NUM)[images])
    columns += [later.flipped, later.factors[:, 0]]
    correlation = np.corrcoef(np.array(columns, np.float64)) - np.eye(len(columns))
    assert np.abs(correlation).max() < SIGMAS / math.sqrt(NUM / len(SIZES))


@pytest.mark.parametrize("size", range(len(FITTING)))
@pytest.mark.parametrize("view", [2, 3])
def test_local_boxes_are_uniform_in_area_in_the_log_of_their_ratio_and_in_position(view: int, size: int) -> None:
    """None of them is ever too large for an image of an ordinary shape, so nothing bends the distribution."""
    boxes, (height, width) = boxes_of(view, size), SIZES[size]
    rounding = 1.5 / math.sqrt(0.05 * height * width)  # of a side to pixels
    check_uniform(boxes.height * boxes.width / (height * width), 0.05, 0.4, slack=0.01)
    check_uniform(np.log(boxes.width / boxes.height), *np.log(RATIO), slack=rounding)
    check_uniform((boxes.top + 0.5) / (height - boxes.height + 1), 0, 1, slack=0.01)
    check_uniform((boxes.left + 0.5) / (width - boxes.width + 1), 0, 1, slack=0.01)


def tried_again(num: int, height: int, width: int, area: tuple[float, float]) -> tuple[NDArray[np.float64], ...]:
    """Areas and log ratios of boxes drawn until one fits, by another generator and without rounding."""
    rng = np.random.default_rng(0)
    areas, ratios = rng.uniform(*area, num), rng.uniform(*np.log(RATIO), num)
    widths, heights = np.sqrt(areas * height * width * np.exp(ratios)), np.sqrt(areas * height * width / np.exp(ratios))
    fits = (widths < width + 0.5) & (heights < height + 0.5)
    return areas[fits], ratios[fits]


@pytest.mark.parametrize("size", range(len(FITTING)))
@pytest.mark.parametrize("view", [0, 1])
def test_global_boxes_are_those_of_trying_again_until_one_fits(view: int, size: int) -> None:
    boxes, (height, width) = boxes_of(view, size), SIZES[size]
    areas, ratios = tried_again(1_000_000, height, width, (0.4, 1.0))
    tolerance = 2.5 / math.sqrt(len(boxes.top)) + 0.01
    for found, expected in (
        (boxes.height * boxes.width / (height * width), areas),
        (np.log(boxes.width / boxes.height), ratios),
    ):
        below = np.searchsorted(np.sort(found), np.quantile(expected, np.linspace(0.05, 0.95, 19))) / len(found)
        assert np.abs(below - np.linspace(0.05, 0.95, 19)).max() < tolerance
    # The place is uniform in what the box leaves free; a box as high as the image leaves nothing.
    for start, free in ((boxes.top, height - boxes.height), (boxes.left, width - boxes.width)):
        room = free > 20
        check_uniform((start[room] + 0.5) / (free[room] + 1), 0, 1, slack=0.03)


def test_a_long_image_gives_boxes_inside_and_its_centre_where_none_fits() -> None:
    boxes, (height, width) = boxes_of(0, 3), SIZES[3]
    assert ((boxes.top >= 0) & (boxes.top + boxes.height <= height)).all()
    assert ((boxes.left >= 0) & (boxes.left + boxes.width <= width)).all()
    # 90 x 120 is the largest of an allowed ratio, and less than 0.4 of the image: so it is what is always taken.
    assert set(zip(boxes.top, boxes.left, boxes.height, boxes.width, strict=True)) == {(0, 140, 90, 120)}


def test_views_come_in_the_official_order_with_their_sizes() -> None:
    augment: DinoAugment = PUBLISHED
    assert [(plan.size, plan.boxes_VB.top.shape) for plan in plans()] == [
        (augment.global_size, (2, NUM)),
        (augment.local_size, (augment.num_local_crops, NUM)),
    ]


@pytest.mark.parametrize("wrong", [0.47, 0.53])
def test_the_check_of_a_rate_catches_another_one(wrong: float) -> None:
    with pytest.raises(AssertionError):
        check_rate(np.arange(NUM) < wrong * NUM, 0.5)
    with pytest.raises(AssertionError):
        check_uniform(np.linspace(0.6, 1.4 + wrong - 0.5, NUM), 0.6, 1.4)
