"""How the weights moved: norms, student and teacher, changes by block, moments, rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dino_exp.analysis.evolution import Measures, Moment
from dino_exp.analysis.figures.labels import label_ends
from dino_exp.analysis.names import place_in_network, short_name
from dino_exp.analysis.style import (
    HEAT,
    INK,
    QUIET,
    SERIES,
    STUDENT,
    TEACHER,
    Picture,
    bare,
    framed_figure,
    house,
    note,
    percent,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LABELS = 14  # of blocks beside a heat map

Read = Callable[[Moment], float | None]


def draw_evolution(moments: Sequence[Moment]) -> Picture:
    """Six panels over the epochs, and the change of each block between checkpoints as a heat map."""
    good = [moment for moment in moments if moment.problem is None]
    with house():
        figure = framed_figure(8.6, left=0.95, right=0.62, top=0.25, wspace=0.5, hspace=0.5)
        grid = figure.add_gridspec(4, 2, height_ratios=[1, 1, 1.3, 1])
        panels = [figure.add_subplot(grid[row, column]) for row, column in ((0, 0), (0, 1), (1, 0), (1, 1))]
        _norms(panels[0], good)
        _apart(panels[1], good)
        _moments(panels[2], good)
        _dead(panels[3], good)
        _changes(figure, figure.add_subplot(grid[2, :]), good)
        _spectra(figure.add_subplot(grid[3, 0]), good, "effective rank", lambda one: one.effective_rank)
        _spectra(figure.add_subplot(grid[3, 1]), good, "spectral norm", lambda one: one.spectral_norm, named=False)
    return Picture(name="evolution", title="How the weights moved", alt=_alt(moments), figure=figure)


def _norms(axes: Axes, moments: Sequence[Moment]) -> None:
    _curves(axes, moments, "norm of all weights", [
        (lambda one: one.total.student_norm, "student", STUDENT),
        (lambda one: one.total.teacher_norm, "teacher", TEACHER),
    ])  # fmt: skip


def _apart(axes: Axes, moments: Sequence[Moment]) -> None:
    _curves(axes, moments, "distance of student and teacher", [(lambda one: one.total.distance, "", INK)])
    last = next((one.total.cosine for one in reversed(moments) if one.total.cosine is not None), None)
    if last is not None:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.25 * (high - low))  # a strip above the curve
        axes.text(0.98, 0.95, f"cosine at the end {last:.5f}", transform=axes.transAxes, ha="right", va="top",
                  color=QUIET, fontsize=8)  # fmt: skip


def _moments(axes: Axes, moments: Sequence[Moment]) -> None:
    _curves(axes, moments, "norm of the optimizer's moments", [
        (lambda one: one.total.first_moment, "first", SERIES[2]),
        (lambda one: one.total.second_moment, "√ second", SERIES[3]),
    ])  # fmt: skip


def _dead(axes: Axes, moments: Sequence[Moment]) -> None:
    def share(one: Moment) -> float | None:
        known = one.dead_prototypes is not None and one.num_prototypes
        return 100 * one.dead_prototypes / one.num_prototypes if known else None  # type: ignore[operator]

    _curves(axes, moments, "dead prototypes, %", [(share, "", INK)])
    if axes.lines:
        axes.set_ylim(bottom=0, top=max(1.0, axes.get_ylim()[1]))


def _curves(axes: Axes, moments: Sequence[Moment], title: str, curves: Sequence[tuple[Read, str, str]]) -> None:
    axes.set_title(title, fontsize=9)
    ends = []
    for read, name, colour in curves:
        points = [
            (one.epochs, value)
            for one in moments
            if one.epochs is not None and (value := read(one)) is not None and math.isfinite(value)
        ]
        if points:
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, color=colour, marker="o" if len(points) <= 60 else None, markersize=3)
            ends.append((epochs[-1], values[-1], name, colour))
    if not ends:
        note(axes, "not in these checkpoints")
        return
    axes.margins(y=0.15)
    label_ends(axes, [end for end in ends if end[2]])


def _changes(figure: Figure, axes: Axes, moments: Sequence[Moment]) -> None:
    axes.set_title("relative change of each block since the checkpoint before, %", fontsize=9)
    moved = [one for one in moments if one.total.relative_change is not None]
    blocks = sorted({name for one in moved for name in one.blocks}, key=place_in_network)
    if not moved or not blocks:
        note(axes, "needs two checkpoints that hold the student")
        return
    rows = [[percent(one.blocks.get(name, Measures()).relative_change) for one in moved] for name in blocks]
    image = axes.imshow(rows, aspect="auto", cmap=HEAT, interpolation="nearest", vmin=0)
    shown = range(0, len(blocks), -(-len(blocks) // _MOST_LABELS))
    axes.set_yticks(list(shown), [short_name(blocks[place]) for place in shown], fontsize=7)
    places = sorted({round(place * (len(moved) - 1) / 6) for place in range(7)})
    axes.set_xticks(places, [f"{moved[place].epochs:.4g}" for place in places])
    axes.set_xlabel("checkpoint of epoch")
    bare(axes)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=14)
    bar.outline.set_visible(False)


def _spectra(
    axes: Axes, moments: Sequence[Moment], title: str, read: Callable[..., float], *, named: bool = True
) -> None:
    names = list(dict.fromkeys(name for one in moments for name in one.spectra))
    curves = [
        (
            (lambda one, name=name: read(one.spectra[name]) if name in one.spectra else None),
            "",
            SERIES[place % len(SERIES)],
        )
        for place, name in enumerate(names)
    ]
    _curves(axes, moments, title, curves)
    axes.set_xlabel("epoch")
    for place, name in enumerate(names if named else ()):
        axes.text(0.3, 0.34 + 0.12 * (len(names) - 1 - place), short_name(name), transform=axes.transAxes,
                  color=SERIES[place % len(SERIES)], fontsize=7)  # fmt: skip


def _alt(moments: Sequence[Moment]) -> str:
    damaged = sum(one.problem is not None for one in moments)
    told = f"{len(moments)} checkpoints" + (f", {damaged} of them cannot be read" if damaged else "")
    norms = [one.total.student_norm or one.total.teacher_norm for one in moments]
    known = [norm for norm in norms if norm is not None]
    if len(known) > 1:
        told += f"; the norm of all weights goes from {known[0]:.4g} to {known[-1]:.4g}"
    return told + "."
