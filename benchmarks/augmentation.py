"""The paper's augmentation: ours against the official pipeline on the same two cores, in images a second.

The official side is a DataLoader with two workers over PIL images in memory, as its training has it; ours is called as
the trainer calls it, with two torch threads, on the same pictures. Neither side decodes files.
`python -m benchmarks.augmentation --official <checkout of facebookresearch/dino>`
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from benchmarks.steps import GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL, Recipe
from dino_exp import build
from dino_exp.data.images import Images

CORES = 2
BATCH = 32
NUM_IMAGES = 128
SIDES = (375, 500)  # of a photograph of ImageNet, standing or lying

AUGMENT = build.build_augment(Recipe(batch=BATCH).config())


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
    for ids in torch.split(torch.arange(len(pictures)), BATCH):
        pixels = torch.zeros(len(ids), 3, max(SIDES), max(SIDES), dtype=torch.uint8)
        sizes = np.array([pictures[index].size[::-1] for index in ids], np.int64)
        for canvas, index, (height, width) in zip(pixels, ids, sizes, strict=True):
            canvas[:, :height, :width] = torch.from_numpy(np.array(pictures[index])).permute(2, 0, 1)
        batches.append((Images(pixels, sizes), ids))
    return batches


@dataclass
class Side:
    """One of the two: what it takes by the clock is `measure`'s result, what it takes of the cores is noted."""

    once: Callable[[], float]  # all images; the seconds of all cores
    core_secs: list[float] = field(default_factory=list)

    def measure(self) -> float:
        started = time.perf_counter()
        self.core_secs.append(self.once())
        return time.perf_counter() - started

    def core_ms(self) -> float:
        """Of one core for one image: another program on the same machine hardly changes it."""
        return 1000 * statistics.median(self.core_secs) / NUM_IMAGES


class Augmented:
    """The official augmentation as a data set, loaded in the process that uses it; each item says what it took."""

    def __init__(self, pictures: list[Image.Image], checkout: Path) -> None:
        self.pictures, self.checkout = pictures, checkout
        self.augment: Callable[[Image.Image], list[Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[list[Tensor], float]:
        if self.augment is None:
            main_dino = official_modules(self.checkout).main_dino
            self.augment = main_dino.DataAugmentationDINO(AUGMENT.global_area, AUGMENT.local_area, NUM_LOCAL)
        started = time.thread_time()
        return self.augment(self.pictures[index]), time.thread_time() - started


def official(pictures: list[Image.Image], checkout: Path) -> Side:
    data: Any = Augmented(pictures, checkout)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=CORES, persistent_workers=True)
    return Side(lambda: sum(float(secs.sum()) for _, secs in loader))


def ours(batches: list[tuple[Images, Tensor]]) -> Side:
    torch.set_num_threads(CORES)

    def once() -> float:
        started = time.process_time()
        for images, ids in batches:
            assert len(AUGMENT(images, ids, 0)) == 2 + NUM_LOCAL
        return time.process_time() - started

    return Side(once)


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
    theirs, own = official(pictures, options.official), ours(as_batches(pictures))
    found = in_pairs(theirs.measure, own.measure, num_pairs=options.pairs)
    console.print(HEADER, markup=False)
    console.print(found.line("official, PIL in 2 workers", "ours, 2 threads", ">= 1"), markup=False)
    for name, side, secs in (("official", theirs, found.a_secs), ("ours", own, found.b_secs)):
        rate = NUM_IMAGES / statistics.median(secs)
        console.print(f"{name}: {rate:.0f} images/s; {side.core_ms():.1f} ms of one core for an image", markup=False)


if __name__ == "__main__":
    main()
