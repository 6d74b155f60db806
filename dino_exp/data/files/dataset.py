"""Images of files as a data set: decoded when asked for, or taken from a cache of decoded ones.

Shapes: B images of a batch, N of the data set, 3 channels, H x W pixels of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dino_exp.data.datasets import Indices, content_digest
from dino_exp.data.files.cache import Canvases
from dino_exp.data.files.decode import DECODER_VERSION, Pixels, UnreadableImageError
from dino_exp.data.files.listing import Listing, shown
from dino_exp.data.files.reading import read_pixels
from dino_exp.data.images import Images
from dino_exp.errors import DataError


@dataclass(frozen=True, kw_only=True, eq=False)
class FilesDataset:
    """One part of a listing. `left_out` are the paths of the unreadable images that both parts do without.

    `cached_N` are the numbers, ascending, of the images that `canvases` holds; None: it holds all of the listing.
    """

    name: str
    listing: Listing
    ids_N: NDArray[np.int64]  # numbers in the listing
    labels_N: NDArray[np.int64]  # -1: no classes
    classes: tuple[str, ...]
    decode_size: int
    left_out: tuple[str, ...] = ()
    canvases: Canvases | None = None
    cached_N: NDArray[np.int64] | None = None

    @property
    def version(self) -> str:
        """Version of what decoding makes of a file."""
        return str(DECODER_VERSION)

    @property
    def channels(self) -> int:
        """Red, green, blue."""
        return 3

    @property
    def num_classes(self) -> int:
        """Number of class folders; 0 where there are no labels."""
        return len(self.classes)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the canvas."""
        return self.decode_size, self.decode_size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ids_N)

    def images(self, indices: Indices) -> Images:
        """The images at `indices`. Raises DataError, naming the file, for one that cannot be read or decoded."""
        canvas_B3HW = np.zeros((len(indices), 3, self.decode_size, self.decode_size), np.uint8)
        sizes_B2 = np.zeros((len(indices), 2), np.int64)
        for place, number in enumerate(self.ids_N[indices].tolist()):
            pixels = self._pixels(number)
            sizes_B2[place] = height, width = pixels.shape[1:]
            canvas_B3HW[place, :, :height, :width] = pixels
        return Images(torch.from_numpy(canvas_B3HW), sizes_B2)

    def _pixels(self, number: int) -> Pixels:
        if self.canvases is not None:
            return self.canvases.pixels(
                number if self.cached_N is None else int(np.searchsorted(self.cached_N, number))
            )
        try:
            return read_pixels(self.listing, number, self.decode_size)
        except UnreadableImageError as problem:
            raise unreadable(self.listing, number, str(problem)) from problem

    def labels(self, indices: Indices) -> Tensor:
        """The classes of the images at `indices`, (B,) int64; -1 where there are none."""
        return torch.from_numpy(self.labels_N[indices])

    def fingerprint(self) -> str:
        """`sha256:` and the digest of name, version, listing, division, labels, size, and what is left out.

        Of what is in the files it knows as much as the listing does.
        """
        description: dict[str, object] = {
            "name": self.name, "version": self.version, "listing": self.listing.digest,
            "classes": list(self.classes), "decode_size": self.decode_size, "left_out": list(self.left_out),
        }  # fmt: skip
        return content_digest(description, self.ids_N.astype("<i8"), self.labels_N.astype("<i8"))


def unreadable(listing: Listing, number: int, reason: str) -> DataError:
    """What to say of an image that cannot be decoded, and what to do."""
    return DataError(
        f"{shown(listing.full_path(number))}: cannot be decoded: {reason}. Repair or remove it, or leave out what "
        "cannot be decoded, with data.unreadable=skip"
    )
