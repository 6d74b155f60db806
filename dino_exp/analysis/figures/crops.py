"""A contact sheet of what training sees: every crop of some images, beside the images themselves.

Shapes: B images, H x W pixels, C channels (1 or 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from dino_exp.analysis.figures.sheet import TITLE, Sheet, drawable
from dino_exp.analysis.style import WIDTH, Picture, house

_LEAST_CELL = 0.72  # inches: as wide as the name of a crop
_LETTER = 0.065  # inches that a letter of an image's name takes
_LINE = 0.14  # inches that a second line of text takes


def draw_crops(names: Sequence[str], views: Sequence[tuple[str, ArrayLike]]) -> Picture:
    """One line for each image of `names`; one column for each view, its name and its pixels (B, H, W, C), 0 to 1.

    Crops of all sizes are drawn in cells of one size; the heading says how many pixels they have. Raises ValueError for
    no image, or another number of images in a view.
    """
    drawn = [(name, drawable(pixels)) for name, pixels in views]
    for name, pixels in drawn:
        if not len(names) or len(pixels) != len(names):
            raise ValueError(f"{len(names)} images and {len(pixels)} of {name}: expected one or more, in every view")
    side = _LETTER * (2 + max(len(part) for name in names for part in name.split("\n")))
    cell = max((WIDTH - side) / len(drawn), _LEAST_CELL)
    with house():
        sheet = Sheet(len(names), len(drawn), cell, title=TITLE + _LINE, side=side)
        for line, name in enumerate(names):
            sheet.label(line, name)
        for column, (name, pixels) in enumerate(drawn):
            height, width = pixels.shape[1:3]
            sheet.head(column, f"{name}\n{width}×{height}")
            for line, crop in enumerate(pixels):
                # What has more pixels than its cell is averaged, what has fewer keeps its squares.
                sheet.put(line, column, np.asarray(crop), interpolation="antialiased")
    return Picture(
        name="crops",
        title="What training sees",
        alt=f"{len(names)} images, each beside its {len(drawn) - 1} crops of one epoch: global ones, then local ones.",
        figure=sheet.figure,
    )
