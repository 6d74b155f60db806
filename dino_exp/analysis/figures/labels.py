"""Names at the ends of lines, in their colours, so that no legend is needed: none over another, none outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_POINTS = 9
_LINE_POINTS = 11.5  # from one name to the next
_GAP_POINTS = 4  # between a line and its name

End = tuple[float, float, str, str]  # x, y, name, colour


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Name lines at their ends. Of more than there is room for only the first ones are named.

    To be called when the axes have their place in the figure and their limits.
    """
    low, high = axes.get_ylim()
    points = _height_points(axes)
    least = _LINE_POINTS * (high - low) / points
    named = list(ends)[: 1 + int(points / _LINE_POINTS)]
    for (x, _, name, colour), y in zip(named, spread_out([end[1] for end in named], least, low, high), strict=True):
        axes.annotate(
            name, (x, y), xytext=(_GAP_POINTS, 0), textcoords="offset points", color=colour, va="center",
            fontsize=FONT_POINTS, annotation_clip=False,
        )  # fmt: skip


def crossed(axes: Axes, y: float, levels: Sequence[float], away: float) -> bool:
    """Whether one of the horizontal lines at `levels` would go through a name that begins `away` points above `y`."""
    low, high = axes.get_ylim()
    point = (high - low) / _height_points(axes)
    return any(y + (away - 1) * point < level < y + (away + _LINE_POINTS) * point for level in levels)


def _height_points(axes: Axes) -> float:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return axes.get_position().height * figure.get_figheight() * 72


def spread_out(heights: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """The same heights, moved as little as possible so that they lie `least` apart, and from `low` to `high`.

    Their order stays, that of equal ones is as given. There must be room for them.
    """
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    # Less their distances they must only not fall: where they would, neighbours share their mean (isotonic regression).
    shared: list[tuple[float, int]] = []
    for rank, place in enumerate(order):
        mean, count = heights[place] - rank * least, 1
        while shared and shared[-1][0] > mean:
            other, more = shared.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        shared.append((mean, count))
    highest = high - (len(heights) - 1) * least
    means = [min(max(mean, low), highest) for mean, count in shared for _ in range(count)]
    moved = list(heights)
    for rank, (place, mean) in enumerate(zip(order, means, strict=True)):
        moved[place] = mean + rank * least
    return moved
