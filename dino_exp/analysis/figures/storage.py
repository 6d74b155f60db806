"""Which part of a state takes how much, and how much of that is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dino_exp.analysis.style import GRID, INK, QUIET, STUDENT, TEACHER, Picture, framed_figure, house
from dino_exp.words import size_text

_COLOURS = {"student": STUDENT, "teacher": TEACHER}
_MEGA = 1e6


class Space(NamedTuple):
    """Of one part: bytes of its tensors, and of these as they are stored for this checkpoint."""

    part: str
    content_bytes: int
    stored_bytes: int


def draw_storage(spaces: Sequence[Space]) -> Picture:
    """A bar for each part: pale is the state, full is what is stored of it."""
    shown = sorted(spaces, key=lambda space: space.content_bytes)
    with house():
        figure = framed_figure(0.8 + 0.36 * max(len(shown), 1), left=0.95)
        axes = figure.subplots()
        places = range(len(shown))
        axes.barh(places, [space.content_bytes / _MEGA for space in shown], color=GRID, height=0.62)
        colours = [_COLOURS.get(space.part, INK) for space in shown]
        axes.barh(places, [space.stored_bytes / _MEGA for space in shown], color=colours, height=0.62)
        for place, space in zip(places, shown, strict=True):
            axes.annotate(
                _words(space), (space.content_bytes / _MEGA, place), xytext=(5, 0), textcoords="offset points",
                va="center", color=QUIET, fontsize=8,
            )  # fmt: skip
        axes.set_yticks(places, [space.part for space in shown])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False)
        axes.margins(x=0.3)
        axes.set_xlim(left=0)
        axes.set_xlabel("MB")
    total = sum(space.content_bytes for space in shown)
    stored = sum(space.stored_bytes for space in shown)
    return Picture(
        name="storage",
        title="What a state consists of, and what is stored",
        alt=f"{size_text(stored)} are stored for {size_text(total)} of tensors.",
        figure=figure,
    )


def _words(space: Space) -> str:
    if not space.content_bytes:
        return size_text(0)
    return f"{size_text(space.content_bytes)}, stored {space.stored_bytes / space.content_bytes:.0%}"
