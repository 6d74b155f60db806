"""Two checkpoints: how far each layer has moved, as a heat map of blocks and kinds."""

from __future__ import annotations

import math
import re
import textwrap
from typing import TYPE_CHECKING

from dino_exp.analysis.comparison import Comparison, relative_by_layer
from dino_exp.analysis.names import short_name
from dino_exp.analysis.style import HEAT, QUIET, STUDENT, TEACHER, Picture, bare, house, new_figure, note, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("student", "teacher")
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)")
_MOST_NUMBERED = 12  # rows into which values are written
_MOST_BARS = 14
_LINE_CHARS = 84  # of the title


def draw_comparison(comparison: Comparison, part: str | None = None) -> Picture:
    """The layers of one of `PARTS`: where none is said the student's, or the teacher's without a student in both."""
    if part is None:
        part = next((part for part in PARTS if relative_by_layer(comparison.tensors, part)), PARTS[0])
    cells = relative_by_layer(comparison.tensors, part)
    blocks = {place: value for place, value in cells.items() if _BLOCK.fullmatch(place[0])}
    others = {place: value for place, value in cells.items() if place not in blocks}
    depth = len({block for block, _ in blocks})
    title = _title(comparison, part)
    with house():
        figure = new_figure(max(3.0, 1.2 + 0.26 * max(depth, min(len(others), _MOST_BARS))))
        figure.suptitle(textwrap.fill(title, _LINE_CHARS), x=0.01, ha="left", fontsize=9)
        left, right = figure.subplots(1, 2, width_ratios=[1.55, 1])
        _heat(figure, left, blocks)
        _bars(right, others, STUDENT if part == "student" else TEACHER)
    return Picture(name="comparison", title=title, alt=_alt(comparison, cells), figure=figure)


def _heat(figure: Figure, axes: Axes, cells: dict[tuple[str, str], float | None]) -> None:
    axes.set_title("blocks: relative change, %", fontsize=9)
    if not cells:
        note(axes, "no blocks in both")
        return
    rows, columns = list(dict.fromkeys(block for block, _ in cells)), list(dict.fromkeys(kind for _, kind in cells))
    columns.sort(key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER))
    values = [[percent(cells.get((block, kind))) for kind in columns] for block in rows]
    image = axes.imshow(values, aspect="auto", cmap=HEAT, interpolation="nearest", vmin=0)
    axes.set_xticks(range(len(columns)), [kind.rpartition(".")[2] for kind in columns], fontsize=8)
    axes.set_yticks(range(len(rows)), [short_name(row) for row in rows], fontsize=8)
    bare(axes)
    if len(rows) <= _MOST_NUMBERED:
        middle = (image.get_clim()[0] + image.get_clim()[1]) / 2
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if math.isfinite(value):
                    colour = "#ffffff" if value < middle else "#000000"
                    axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)
    else:
        figure.colorbar(image, ax=axes, pad=0.01).outline.set_visible(False)


_ORDER = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def _bars(axes: Axes, cells: dict[tuple[str, str], float | None], colour: str) -> None:
    axes.set_title("the rest: relative change, %", fontsize=9)
    known = {_named(place): 100 * value for place, value in cells.items() if value is not None}
    if not known:
        note(axes, "nothing else in both")
        return
    shown = list(known.items())[:_MOST_BARS][::-1]
    axes.barh(range(len(shown)), [value for _, value in shown], color=colour, height=0.62)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    if len(known) > _MOST_BARS:
        axes.text(
            1, 0, f"{len(known) - _MOST_BARS} more", transform=axes.transAxes, ha="right", color=QUIET, fontsize=8
        )


def _named(place: tuple[str, str]) -> str:
    block, kind = place
    bare = short_name(block)
    return bare if kind in ("", block) else f"{bare}.{kind}"


def _title(comparison: Comparison, part: str) -> str:
    a, b = comparison.a, comparison.b
    begin, end = (f"step {facts['step']:,} of {facts['run_key'] or 'an unnamed run'}" for facts in (a, b))
    if a["run_key"] == b["run_key"]:
        end = f"step {b['step']:,}"
    return f"{part.capitalize()}: from {begin} to {end}"


def _alt(comparison: Comparison, cells: dict[tuple[str, str], float | None]) -> str:
    if comparison.is_equal:
        return "All tensors are equal."
    known = {place: value for place, value in cells.items() if value is not None}
    if not known:
        return "No layer is in both."
    place = max(known, key=lambda place: known[place])
    return f"The largest relative change, {100 * known[place]:.3g} %, is in {_named(place)}."
