"""Made-up colour images with classes: for tests and benchmarks that need RGB without a download.

A class is a stripe pattern (direction, wavelength) in two colours; an image of it has a phase, a brightness
and grain of its own. Every pixel is a pure function of (split, index).

Shapes: B images, P pixels along a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_exp.data.datasets import Indices, content_digest
from dino_exp.data.images import Images
from dino_exp.errors import ConfigError
from dino_exp.rng import Stream

SIDE = 32
_SEED = 0  # the images are a fixed data set: the seed of a training must not change them
_FINGERPRINTED = 64


@dataclass(frozen=True, kw_only=True)
class SyntheticDataset:
    """`num_samples` images (3, 32, 32); image i is of class i modulo `num_classes`."""

    split: str
    num_samples: int
    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.num_samples < self.num_classes:
            raise ConfigError(
                f"data.num_samples is {self.num_samples} and data.num_classes is {self.num_classes}; "
                "expected a class at least, and an image of each: try data.num_samples=512 data.num_classes=8"
            )

    @property
    def name(self) -> str:
        """Name and split."""
        return f"synthetic/{self.split}"

    @property
    def version(self) -> str:
        """Version of the formula below."""
        return "1"

    @property
    def channels(self) -> int:
        """Red, green, blue."""
        return 3

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return SIDE, SIDE

    def __len__(self) -> int:
        """Number of images."""
        return self.num_samples

    def labels(self, indices: Indices) -> Tensor:
        """The classes of the images at `indices`, (B,) int64."""
        return torch.from_numpy(np.asarray(indices, np.int64) % self.num_classes)

    def images(self, indices: Indices) -> Images:
        """The images at `indices`, (B, 3, 32, 32) each."""
        stripes_BPP = self._stripes(indices)[:, None]
        look_BK = Stream(_SEED, "data.synthetic.classes").uniform(self.labels(indices).numpy(), 1, num=6)
        dark_BC11, light_BC11 = look_BK[:, :3, None, None], look_BK[:, 3:, None, None]
        own = Stream(_SEED, f"data.synthetic.{self.split}")
        brightness_B111 = 0.8 + 0.4 * own.uniform(indices, 1, num=1)[:, :, None, None]
        grain_BPP = 0.1 * (own.uniform(indices, 2, num=SIDE * SIDE).reshape(-1, 1, SIDE, SIDE) - 0.5)
        colour = dark_BC11 + (light_BC11 - dark_BC11) * stripes_BPP
        pixels = np.rint(255 * np.clip(colour * brightness_B111 + grain_BPP, 0, 1))
        return Images.whole(torch.from_numpy(pixels.astype(np.uint8)))

    def _stripes(self, indices: Indices) -> NDArray[np.float64]:
        """(B, P, P) from 0 to 1: a triangle wave across the picture, which needs no rounding-prone sine."""
        pattern_BK = Stream(_SEED, "data.synthetic.classes").uniform(self.labels(indices).numpy(), 0, num=2)
        phase_B = Stream(_SEED, f"data.synthetic.{self.split}").uniform(indices, 0, num=1)[:, 0]
        across, down = 4 * pattern_BK[:, 0] - 2, 1 + 3 * pattern_BK[:, 1]  # periods in the picture
        at = np.arange(SIDE) / SIDE
        turns = (
            across[:, None, None] * at[None, None, :] + down[:, None, None] * at[None, :, None] + phase_B[:, None, None]
        )
        return np.asarray(np.abs(2 * (turns - np.floor(turns)) - 1))

    def fingerprint(self) -> str:
        """`sha256:` and the digest of the definition and of the first images (a changed formula shows)."""
        first = np.arange(min(self.num_samples, _FINGERPRINTED))
        description = {"name": self.name, "version": self.version}
        counts = {"num_samples": self.num_samples, "num_classes": self.num_classes}
        return content_digest({**description, **counts}, self.images(first).pixels_BCHW.numpy())
