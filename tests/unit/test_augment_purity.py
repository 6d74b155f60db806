"""What both augmentations promise: crops are a pure function of seed, epoch, image and crop."""

import functools
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pictures import listing_of, small_tree
from torch import Tensor

from dino_exp.data.augment_digits import DigitsAugment
from dino_exp.data.augment_dino import DinoAugment
from dino_exp.data.datasets import Dataset
from dino_exp.data.digits import load_digits_split
from dino_exp.data.files.dataset import FilesDataset
from dino_exp.data.images import Images
from dino_exp.data.loader import BatchStream
from dino_exp.data.synthetic import SyntheticDataset

DIGITS = DigitsAugment(
    seed=0,
    global_size=16,
    local_size=8,
    num_local_crops=4,
    global_area=(0.65, 1.0),
    local_area=(0.4, 0.8),
    ratio=(0.8, 1.25),
    max_rotation_degrees=15.0,
    blur_probability=0.2,
    max_gain=0.2,
    noise_std=0.03,
)
DINO = DinoAugment(
    seed=0,
    global_size=32,
    local_size=16,
    num_local_crops=2,
    global_area=(0.4, 1.0),
    local_area=(0.05, 0.4),
    ratio=(3 / 4, 4 / 3),
    flip_probability=0.5,
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grey_probability=0.2,
    blur_probabilities=(1.0, 0.1, 0.5),
    blur_radius=(0.1, 2.0),
    solarise_probability=0.2,
)
Augment = DigitsAugment | DinoAugment


@functools.cache
def pictures() -> tempfile.TemporaryDirectory[str]:
    """170 pictures of different sizes; gone when this process ends."""
    place = tempfile.TemporaryDirectory(prefix="pictures-")
    small_tree(Path(place.name), 170)
    return place


def files() -> FilesDataset:
    listing = listing_of(Path(pictures().name))
    return FilesDataset(
        name="folder/train", listing=listing, ids_N=np.arange(len(listing)), labels_N=np.full(len(listing), -1),
        classes=(), decode_size=40,
    )  # fmt: skip


Case = tuple[Augment, Dataset]
CASES: dict[str, Callable[[], Case]] = {
    "digits": lambda: (DIGITS, load_digits_split("train")),
    "dino": lambda: (DINO, SyntheticDataset(split="train", num_samples=256, num_classes=8)),
    "files": lambda: (DINO, files()),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def crops_of(case: Case, ids: Tensor, epoch: int = 3) -> list[Tensor]:
    augment, dataset = case
    return augment(dataset.images(ids.numpy()), ids, epoch)


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_crops_have_the_declared_sizes(case: Case) -> None:
    augment, dataset = case
    crops = crops_of(case, torch.arange(5))
    sizes = [augment.global_size] * 2 + [augment.local_size] * augment.num_local_crops
    assert [tuple(crop.shape) for crop in crops] == [(5, dataset.channels, size, size) for size in sizes]
    assert {crop.dtype for crop in crops} == {torch.float32}
    assert all(bool(crop.isfinite().all()) for crop in crops)


@pytest.mark.parametrize("split", [[1, 63], [32, 32], [7, 1, 50, 6], [1] * 64])
def test_any_split_of_the_batch_gives_the_same_bits(case: Case, split: list[int]) -> None:
    ids = torch.arange(100, 164)
    parts = [crops_of(case, part) for part in ids.split(split)]
    assert_equal([torch.cat(view) for view in zip(*parts, strict=True)], crops_of(case, ids))


def mixed(num: int) -> Images:
    """Images of several sizes on a canvas that is larger than any of them."""
    sizes_B2 = np.array([[40, 60], [60, 40], [33, 33], [64, 21]])[np.arange(num) % 4]
    pixels = torch.zeros(num, 3, 70, 71, dtype=torch.uint8)
    for place, (height, width) in enumerate(sizes_B2):
        noise = np.random.default_rng(place).integers(0, 256, (3, height, width), np.uint8)
        pixels[place, :, :height, :width] = torch.from_numpy(noise)
    return Images(pixels, sizes_B2)


def on_least_canvas(images: Images) -> Images:
    """The same as a loader gives them to whom the larger ones of the batch went elsewhere."""
    height, width = images.sizes_B2.max(axis=0)
    return Images(images.pixels_BCHW[..., :height, :width].contiguous(), images.sizes_B2)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("split", [[1, 23], [7, 1, 16], [1] * 24])
def test_mixed_sizes_in_any_split_on_any_canvas_by_any_number_of_threads(split: list[int], num_threads: int) -> None:
    """Also where the sides of a crop are no multiples of anything that a processor does at once."""
    augment, images, ids = replace(DINO, global_size=37, local_size=11), mixed(24), torch.arange(24)
    before = torch.get_num_threads()
    whole = augment(images, ids, 0)
    torch.set_num_threads(num_threads)
    parts, start = [], 0
    for num in split:
        places = slice(start, start + num)
        parts.append(augment(on_least_canvas(images.at(places)), ids[places], 0))
        start += num
    assert torch.get_num_threads() == num_threads
    torch.set_num_threads(before)
    assert_equal([torch.cat(view) for view in zip(*parts, strict=True)], whole)


def test_a_batch_at_once_as_an_accelerator_wants_it_gives_the_same_but_for_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where some crops, not all, are changed, and for images of several sizes."""
    images, ids = mixed(24), torch.arange(24)
    by_parts = DINO(images, ids, 0)
    monkeypatch.setattr("dino_exp.data.threads.by_parts", lambda _: False)
    at_once = DINO(images, ids, 0)
    for one, other in zip(by_parts, at_once, strict=True):
        difference = (one - other).abs() * max(DINO.std) * 255  # in bytes, at most: resizing rounds them another way
        assert float((difference > 0.1).float().mean()) < 0.02
        assert float(difference.max()) < 12  # a byte by jitter, contrast and solarising
    assert all(torch.equal(one, other) for one, other in zip(at_once, DINO(images, ids, 0), strict=True))


def test_the_place_in_the_batch_does_not_matter(case: Case) -> None:
    ids = torch.arange(20)
    order = torch.tensor([3, 19, 0, 7])
    assert_equal(crops_of(case, ids[order]), [crop[order] for crop in crops_of(case, ids)])


def test_seed_epoch_image_and_crop_all_matter(case: Case) -> None:
    augment, dataset = case
    same = dataset.images(np.zeros(2, np.int64))  # one picture under two numbers
    views = augment(same, torch.tensor([0, 1]), 0)
    variants = [*views[0], *views[1], *augment(same, torch.tensor([0, 1]), 1)[0]]
    variants += list(replace(augment, seed=1)(same, torch.tensor([0, 1]), 0)[0])
    for number, one in enumerate(variants):
        assert not any(torch.equal(one, other) for other in variants[:number])


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_the_same_crops_from_any_number_of_workers_and_any_start(case: Case, num_workers: int) -> None:
    augment, dataset = case

    def crops_from(start_step: int, num_workers: int, num: int) -> list[Tensor]:
        stream = BatchStream(dataset, seed=5, batch_size=24, start_step=start_step, num_workers=num_workers)
        with stream:
            batches = list(islice(stream, num))
        return [crop for b in batches for crop in augment(b.images, b.sample_ids_B, b.epoch)]

    whole = crops_from(0, 0, 13)
    per_step = len(whole) // 13
    assert_equal(crops_from(8, num_workers, 5), whole[8 * per_step :])  # over the end of an epoch, for dino


def test_the_input_and_every_stateful_generator_stay_untouched(case: Case) -> None:
    augment, dataset = case
    images, ids = dataset.images(np.arange(8)), torch.arange(8)
    kept = images.pixels_BCHW.clone()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    augment(images, ids, 0)
    augment.clean(images)
    assert torch.equal(images.pixels_BCHW, kept)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


def test_the_clean_view_is_at_the_global_size_and_split_proof(case: Case) -> None:
    augment, dataset = case
    images = dataset.images(np.arange(20))
    whole = augment.clean(images)
    assert whole.shape == (20, dataset.channels, augment.global_size, augment.global_size)
    assert torch.equal(
        torch.cat([augment.clean(part) for part in (images.at(slice(3)), images.at(slice(3, 20)))]), whole
    )


def test_no_local_crops_is_allowed(case: Case) -> None:
    augment, dataset = case
    crops = replace(augment, num_local_crops=0)(dataset.images(np.arange(4)), torch.arange(4), 0)
    assert len(crops) == 2
    assert_equal(crops, crops_of(case, torch.arange(4), epoch=0)[:2])
