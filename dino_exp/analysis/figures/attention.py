"""Pictures of what a vision transformer sees in images: where its class token looks, and which patches are alike.

Shapes: B images, H x W pixels, C channels (1 or 3), rows x cols patches. Pixels are drawn as they are, not smoothed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dino_exp.analysis.figures.sheet import LEAST_CELL, TITLE, Sheet, drawable
from dino_exp.analysis.style import HEAT, WIDTH, Picture, house

_PAIRS_A_LINE = 8  # images side by side, their colours below them


def draw_attention(images_BHWC: ArrayLike, attention: ArrayLike) -> Picture:
    """One line an image: the image (0 to 1), the mean over heads, and each head of `attention` (B, heads, rows, cols).

    Every map has a scale of its own, from 0 to its largest value: heads differ in how much they look at the class token
    itself, and the picture is about where they look. Raises ValueError for no image, or another number of maps.
    """
    images, maps = drawable(images_BHWC), np.asarray(attention, np.float64)
    _check(images, maps, "attention")
    num_images, num_heads = maps.shape[:2]
    titles = ["image", "mean", *(f"head {head + 1}" for head in range(num_heads))]
    cell = max(WIDTH / len(titles), LEAST_CELL)
    with house():
        sheet = Sheet(num_images, len(titles), cell, title=TITLE)
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
    images, patches = drawable(images_BHWC), np.asarray(colours, np.float64)
    _check(images, patches, "colours")
    across = min(len(images), _PAIRS_A_LINE)
    lines = -(-len(images) // across)
    cell = WIDTH / max(across, 4)
    with house():
        sheet = Sheet(2 * lines, across, cell)
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


def _check(images: NDArray[np.float64], maps: NDArray[np.float64], name: str) -> None:
    if not len(images) or len(images) != len(maps) or maps.ndim != 4:
        raise ValueError(f"{len(images)} images and {name} of shape {maps.shape}: expected one or more, of each image")
