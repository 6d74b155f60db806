"""Images of a batch, which may differ in size.

Shapes: B images, C channels, H x W pixels of the canvas that all of them share.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sizes = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """Images as uint8, each in the upper left corner of its canvas; the rest of the canvas is 0.

    `sizes_B2` are their true heights and widths in pixels, on the host, where random parameters are drawn.
    Raises TypeError for pixels of another type, which would be scaled twice.
    """

    pixels_BCHW: Tensor
    sizes_B2: Sizes

    def __post_init__(self) -> None:
        if self.pixels_BCHW.dtype != torch.uint8:
            raise TypeError(f"expected images of uint8, found {self.pixels_BCHW.dtype}")
        assert self.sizes_B2.shape == (len(self.pixels_BCHW), 2), self.sizes_B2.shape

    @classmethod
    def whole(cls, pixels_BCHW: Tensor) -> Images:
        """Images that fill their canvas."""
        num, _, height, width = pixels_BCHW.shape
        return cls(pixels_BCHW, np.tile(np.array([height, width], np.int64), (num, 1)))

    @property
    def fill_canvas(self) -> bool:
        """Whether all are as large as the canvas."""
        return bool((self.sizes_B2 == self.pixels_BCHW.shape[-2:]).all())

    @property
    def device(self) -> torch.device:
        """Where the pixels lie."""
        return self.pixels_BCHW.device

    def __len__(self) -> int:
        """Number of images."""
        return len(self.pixels_BCHW)

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        return replace(self, pixels_BCHW=to_device(self.pixels_BCHW, device))

    def at(self, places: slice) -> Images:
        """Some of the images."""
        return Images(self.pixels_BCHW[places], self.sizes_B2[places])


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, for which the host does not wait: through memory that the device can read."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
