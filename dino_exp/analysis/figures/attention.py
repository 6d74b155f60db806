"""Pictures of what a vision transformer sees in images: where its class token looks, and which patches are alike.

Shapes: B images, H x W pixels, C channels (1 or 3), rows x cols patches. Pixels are drawn as they are, not smoothed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dino_exp.analysis.style import HEAT, WIDTH, Picture, framed_figure, house

_LEAST_CELL = 0.62  # inches: smaller ones show nothing in a thumbnail
_TITLE = 0.3  # inches above the cells
_GAP = 0.03  # of a cell, around each
_PAIRS_A_LINE = 8  # images side by side, their colours below them


def draw_attention(images_BHWC: ArrayLike, attention: ArrayLike) -> Picture:
    """One line an image: the image (0 to 1), the mean over heads, and each head of `attention` (B, heads, rows, cols).

    Every map has a scale of its own, from 0 to its largest value: heads differ in how much they look at the class token
    itself, and the picture is about where they look. Raises ValueError for no image, or another number of maps.
    """
    images, maps = _pixels(images_BHWC), np.asarray(attention, np.float64)
    _check(images, maps, "attention")
    num_images, num_heads = maps.shape[:2]
    titles = ["image", "mean", *(f"head {head + 1}" for head in range(num_heads))]
    cell = max(WIDTH / len(titles), _LEAST_CELL)
    with house():
        sheet = _Sheet(num_images, len(titles), cell, title=_TITLE)
        for line, (image, heads) in enumerate(zip(images, maps, strict=True)):
            sheet.put(line, 0, image)
            for column, values in enumerate([heads.mean(axis=0), *heads], 1):
                sheet.put(line, column, values, cmap=HEAT, vmin=0, vmax=max(float(values.max()), np.finfo(float).tiny))
        for column, title in enumerate(titles):
            sheet.head(column, title)
    heads_text = f"{num_heads} head{'s' if num_heads != 1 else ''}"
    return Picture(
        name="attention",
        title="Attention of the class token",
        alt=f"{num_images} images, each beside where the class token looks in the last block: the mean of {heads_text} "
        "and each of them; bright patches are looked at most.",
        figure=sheet.figure,
    )


def draw_patch_colours(images_BHWC: ArrayLike, colours: ArrayLike) -> Picture:
    """Each image (0 to 1) above its patches in `colours` (B, rows, cols, 3), 0 to 1, as `patch_colours` makes them.

    Raises ValueError for no image, or another number of colourings.
    """
    images, patches = _pixels(images_BHWC), np.asarray(colours, np.float64)
    _check(images, patches, "colours")
    across = min(len(images), _PAIRS_A_LINE)
    lines = -(-len(images) // across)
    cell = WIDTH / max(across, 4)
    with house():
        sheet = _Sheet(2 * lines, across, cell)
        for at, (image, patch) in enumerate(zip(images, patches, strict=True)):
            line, column = divmod(at, across)
            sheet.put(2 * line, column, image)
            sheet.put(2 * line + 1, column, patch)
    return Picture(
        name="features",
        title="Principal components of the patches",
        alt=f"{len(images)} images, each above its patches, coloured by the first three principal components of their "
        "features; alike colours are alike features.",
        figure=sheet.figure,
    )


class _Sheet:
    """Cells of one size close to each other, all on one pair of axes: axes for each take a second to be laid out."""

    def __init__(self, lines: int, columns: int, cell: float, *, title: float = 0.0) -> None:
        self.figure = framed_figure(lines * cell + title, width=columns * cell)
        self._axes = self.figure.add_axes((0, 0, 1, lines * cell / (lines * cell + title)))
        self._axes.set_axis_off()
        self._columns, self._lines = columns, lines

    def put(self, line: int, column: int, pixels: NDArray[np.float64], **options: Any) -> None:
        """An image in one cell; numbers without a colour map are grey."""
        grey: dict[str, Any] = {} if pixels.ndim == 3 or options else {"cmap": "gray", "vmin": 0, "vmax": 1}
        place = (column + _GAP, column + 1 - _GAP, line + 1 - _GAP, line + _GAP)
        self._axes.imshow(pixels, interpolation="nearest", extent=place, aspect="auto", **grey, **options)
        self._axes.set(xlim=(0, self._columns), ylim=(self._lines, 0))

    def head(self, column: int, title: str) -> None:
        """The name of a column."""
        self._axes.annotate(title, (column + 0.5, 0), xytext=(0, 3), textcoords="offset points", ha="center",
                            va="bottom", fontsize=9, annotation_clip=False)  # fmt: skip


def _pixels(images_BHWC: ArrayLike) -> NDArray[np.float64]:
    """Grey images as (B, H, W), coloured ones as (B, H, W, 3), from 0 to 1."""
    images = np.asarray(images_BHWC, np.float64).clip(0, 1)
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def _check(images: NDArray[np.float64], maps: NDArray[np.float64], name: str) -> None:
    if not len(images) or len(images) != len(maps) or maps.ndim != 4:
        raise ValueError(f"{len(images)} images and {name} of shape {maps.shape}: expected one or more, of each image")
