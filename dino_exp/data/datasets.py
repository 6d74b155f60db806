"""What a data set is to the rest of the program, and the one that lies in memory.

Shapes: B images of a batch, N of the data set, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_exp.data.images import Images
from dino_exp.errors import ConfigError
from dino_exp.errors import DataError as DataError  # for whoever looks for it beside the protocol

Indices = NDArray[np.int64]


class Dataset(Protocol):
    """Numbered images. `images` is what a loader worker runs, so a data set must survive pickling."""

    @property
    def name(self) -> str:
        """Name and split, for example `digits/train`."""

    @property
    def version(self) -> str:
        """Changes whenever the same name means other images."""

    @property
    def channels(self) -> int:
        """Channels of every image: 1 (grey) or 3 (red, green, blue)."""

    @property
    def num_classes(self) -> int:
        """Labels are whole numbers from 0 to `num_classes - 1`; 0 where there are no labels."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the canvas on which every image lies."""

    def __len__(self) -> int:
        """Number of images."""

    def images(self, indices: Indices) -> Images:
        """The images at `indices`. A pure function of each index."""

    def labels(self, indices: Indices) -> Tensor:
        """The classes of the images at `indices`, (B,) int64; -1 where there are no classes."""

    def fingerprint(self) -> str:
        """`sha256:` and the digest of name, version and content: equal for equal data on any machine."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ArrayDataset:
    """A data set that lies in memory as one array."""

    name: str
    version: str
    num_classes: int
    images_NCHW: NDArray[np.uint8]  # numpy, because a tensor would travel to workers through /dev/shm
    labels_N: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.images_NCHW.dtype != np.uint8 or self.images_NCHW.ndim != 4:
            raise ConfigError(
                f"data set {self.name}: expected images (N, C, H, W) of uint8, "
                f"found {tuple(self.images_NCHW.shape)} of {self.images_NCHW.dtype}"
            )
        if self.labels_N.shape != self.images_NCHW.shape[:1]:
            raise ConfigError(
                f"data set {self.name}: {len(self.images_NCHW)} images have {len(self.labels_N)} labels; "
                "expected one label an image"
            )

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return int(self.images_NCHW.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image, in pixels."""
        return self.images_NCHW.shape[2], self.images_NCHW.shape[3]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images_NCHW)

    def images(self, indices: Indices) -> Images:
        """The images at `indices`."""
        return Images.whole(torch.from_numpy(self.images_NCHW[indices]))

    def labels(self, indices: Indices) -> Tensor:
        """The classes of the images at `indices`, (B,) int64."""
        return torch.from_numpy(self.labels_N[indices])

    def fingerprint(self) -> str:
        """`sha256:` and the digest of name, version, shape, and every pixel and label."""
        shape = list(self.images_NCHW.shape)
        return content_digest(
            {"name": self.name, "version": self.version, "classes": self.num_classes, "shape": shape},
            self.images_NCHW,
            self.labels_N,
        )


def content_digest(description: dict[str, object], *arrays: NDArray[np.generic]) -> str:
    """SHA-256 over a JSON description and the row-major bytes of arrays, as `sha256:<hex>`."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return f"sha256:{digest.hexdigest()}"
