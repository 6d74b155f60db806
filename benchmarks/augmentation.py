"""The paper's augmentation: ours against the official pipeline on the same two cores, in images a second.

The official side is a DataLoader with two workers over PIL images in memory, as its training has it; ours is called as
the trainer calls it, with two torch threads, on the same pictures. Neither side decodes files.
`python -m benchmarks.augmentation --official <checkout of facebookresearch/dino>`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import HEADER, in_pairs
from benchmarks.official import official_modules
from dino_exp.data.augment_dino import DinoAugment
from dino_exp.data.images import Images

CORES = 2
BATCH = 32
NUM_IMAGES = 128
SIDES = (375, 500)  # of a photograph of ImageNet, standing or lying
NUM_LOCAL, GLOBAL_SIZE, LOCAL_SIZE = 8, 224, 96
GLOBAL_AREA, LOCAL_AREA = (0.4, 1.0), (0.05, 0.4)

AUGMENT = DinoAugment(
    seed=0,
    global_size=GLOBAL_SIZE,
    local_size=LOCAL_SIZE,
    num_local_crops=NUM_LOCAL,
    global_area=GLOBAL_AREA,
    local_area=LOCAL_AREA,
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


def photographs(num: int) -> list[Image.Image]:
    """Pictures of a photograph's size and noise, every other one standing."""
    rng, pictures = np.random.default_rng(0), []
    for number in range(num):
        height, width = SIDES if number % 2 else SIDES[::-1]
        y, x = np.mgrid[:height, :width] / 50
        waves = [np.sin(x * rng.uniform(0, 3) + y * rng.uniform(0, 3) + rng.uniform(0, 6)) for _ in range(3)]
        pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return pictures


def as_batches(pictures: list[Image.Image]) -> list[tuple[Images, Tensor]]:
    """The same as our loader gives them: on canvases, with their numbers."""
    batches = []
    for ids in torch.arange(len(pictures)).split(BATCH):
        pixels = torch.zeros(len(ids), 3, max(SIDES), max(SIDES), dtype=torch.uint8)
        sizes = np.array([pictures[index].size[::-1] for index in ids], np.int64)
        for canvas, index, (height, width) in zip(pixels, ids, sizes, strict=True):
            canvas[:, :height, :width] = torch.from_numpy(np.array(pictures[index])).permute(2, 0, 1)
        batches.append((Images(pixels, sizes), ids))
    return batches


class Augmented:
    """The official augmentation as a data set, loaded in the process that uses it."""

    def __init__(self, pictures: list[Image.Image], checkout: Path) -> None:
        self.pictures, self.checkout = pictures, checkout
        self.augment: Callable[[Image.Image], list[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> list[Tensor]:
        if self.augment is None:
            main_dino = official_modules(self.checkout).main_dino
            self.augment = main_dino.DataAugmentationDINO(GLOBAL_AREA, LOCAL_AREA, NUM_LOCAL)
        return self.augment(self.pictures[index])


def official(pictures: list[Image.Image], checkout: Path) -> Callable[[], float]:
    data: Any = Augmented(pictures, checkout)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=CORES, persistent_workers=True)

    def measure() -> float:
        started = time.perf_counter()
        for crops in loader:
            assert len(crops) == 2 + NUM_LOCAL
        return time.perf_counter() - started

    return measure


def ours(batches: list[tuple[Images, Tensor]]) -> Callable[[], float]:
    def measure() -> float:
        torch.set_num_threads(CORES)
        started = time.perf_counter()
        for images, ids in batches:
            assert len(AUGMENT(images, ids, 0)) == 2 + NUM_LOCAL
        return time.perf_counter() - started

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, required=True, help="a checkout of facebookresearch/dino")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    pictures = photographs(NUM_IMAGES)
    console = Console(soft_wrap=True)
    console.print(
        f"2x{GLOBAL_SIZE} + {NUM_LOCAL}x{LOCAL_SIZE} crops of {NUM_IMAGES} images, {CORES} cores\n", markup=False
    )
    found = in_pairs(official(pictures, options.official), ours(as_batches(pictures)), num_pairs=options.pairs)
    console.print(HEADER, markup=False)
    console.print(found.line("official, PIL in 2 workers", "ours, 2 threads", ">= 1"), markup=False)
    rates = [NUM_IMAGES / np.median(secs) for secs in (found.a_secs, found.b_secs)]
    console.print(f"\nofficial {rates[0]:.0f} images/s, ours {rates[1]:.0f} images/s", markup=False)


if __name__ == "__main__":
    main()
