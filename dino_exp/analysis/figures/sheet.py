"""Many small images close to each other, in lines and columns with names."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dino_exp.analysis.style import framed_figure

LEAST_CELL = 0.62  # inches: smaller ones show nothing in a thumbnail
TITLE = 0.3  # inches above the cells, for one line of text
_GAP = 0.03  # of a cell, around each


class Sheet:
    """Cells of one size close to each other, all on one pair of axes: axes for each take a second to be laid out."""

    def __init__(self, lines: int, columns: int, cell: float, *, title: float = 0.0, side: float = 0.0) -> None:
        """`cell`, `title` above the cells and `side` on their left are in inches."""
        width, height = columns * cell + side, lines * cell + title
        self.figure = framed_figure(height, width=width)
        self._axes = self.figure.add_axes((side / width, 0, columns * cell / width, lines * cell / height))
        self._axes.set_axis_off()
        self._columns, self._lines = columns, lines

    def put(self, line: int, column: int, pixels: NDArray[np.float64], **options: Any) -> None:
        """An image in one cell; numbers without a colour map are grey."""
        grey: dict[str, Any] = {} if pixels.ndim == 3 or "cmap" in options else {"cmap": "gray", "vmin": 0, "vmax": 1}
        place = (column + _GAP, column + 1 - _GAP, line + 1 - _GAP, line + _GAP)
        drawn = {"interpolation": "nearest", "extent": place, "aspect": "auto"} | grey | options
        self._axes.imshow(pixels, **drawn)
        self._axes.set(xlim=(0, self._columns), ylim=(self._lines, 0))

    def head(self, column: int, title: str) -> None:
        """The name of a column."""
        self._axes.annotate(title, (column + 0.5, 0), xytext=(0, 3), textcoords="offset points", ha="center",
                            va="bottom", fontsize=9, annotation_clip=False)  # fmt: skip

    def label(self, line: int, text: str) -> None:
        """The name of a line, on the left of its cells."""
        self._axes.annotate(text, (0, line + 0.5), xytext=(-4, 0), textcoords="offset points", ha="right",
                            va="center", fontsize=8, annotation_clip=False)  # fmt: skip


def drawable(images_BHWC: ArrayLike) -> NDArray[np.float64]:
    """Grey images as (B, H, W), coloured ones as (B, H, W, 3), from 0 to 1."""
    images = np.asarray(images_BHWC, np.float64).clip(0, 1)
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
