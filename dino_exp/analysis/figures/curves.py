"""Metrics over the epochs: accuracy, losses, health, and what drove them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dino_exp.analysis.figures.labels import FONT_POINTS, crossed, label_ends
from dino_exp.analysis.history import History, Series
from dino_exp.analysis.style import (
    ALARM,
    BEST,
    INK,
    QUIET,
    SERIES,
    STUDENT,
    TEACHER,
    Picture,
    framed_figure,
    house,
    note,
)
from dino_exp.dino.collapse import DOMINANCE_RATIO, MAX_DIVERGENCE, UNIFORM_RATIO
from dino_exp.runs.record import Best

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 800  # of a curve: more than a page has pixels
_FROM_BEST = 7  # points between the mark of the best one and its name
_ROOM = 1.16  # of the axis, for the names at the ends of lines
_DOTTED = (0, (1, 2))
_BASELINES = (("pixel_", "raw pixels"), ("init_", "untrained"))


@dataclass(frozen=True)
class Line:
    """A curve and how it is drawn."""

    series: Series
    name: str
    colour: str
    style: str = "-"
    scale: float = 1.0


def draw_accuracy(history: History, per_epoch: int, best: Best | None) -> Picture:
    """k-NN accuracy over the epochs, in percent, with what raw pixels and the untrained model reach."""
    lines = [
        Line(history.series("knn_top1"), "k = 20", TEACHER, scale=100),
        Line(history.series("knn_10shot"), "10 labels", STUDENT, scale=100),
        Line(history.series("knn_1shot"), "1 label", SERIES[3], scale=100),
    ]
    lines = [line for line in lines if len(line.series)]
    with house():
        figure = framed_figure(3.2)
        axes = figure.subplots()
        if not any(len(line.series.finite) for line in lines):
            note(axes, "no evaluation yet")
        else:
            levels = _baselines(history)
            _draw(axes, lines, per_epoch, with_markers=True, levels=levels)
            if best is not None and best.metric == "knn_top1":
                x, y = best.step / per_epoch, 100 * best.value
                axes.plot(x, y, "o", color=BEST, markersize=8, zorder=5)
                at_end = x > 0.9 / _ROOM * axes.get_xlim()[1]  # where the names of the lines begin
                above = not crossed(axes, y, [level for level, _ in levels], _FROM_BEST)
                axes.annotate(
                    f"best {y:.1f}", (x, y), xytext=(0, _FROM_BEST if above else -_FROM_BEST),
                    textcoords="offset points", color=BEST, fontsize=FONT_POINTS,
                    ha="right" if at_end else "center", va="bottom" if above else "top",
                )  # fmt: skip
            axes.set_ylabel("k-NN accuracy, %")
    knn = history.series("knn_top1")
    told = f"k-NN accuracy with k = 20 {_ending(knn, 100, '.1f', ' %')}." if len(knn) else "No evaluation yet."
    return Picture(name="accuracy", title="k-NN accuracy of frozen teacher features", alt=told, figure=figure)


def _ending(series: Series, scale: float, digits: str, unit: str = "") -> str:
    """Where a curve ends, in words: with its last number, and whether rows without one come after it."""
    finite = series.finite
    if not len(finite):
        return "is never a number"
    value = f"{scale * finite.values[-1]:{digits}}{unit}"
    if math.isfinite(series.values[-1]):
        return f"is {value} at the end"
    return f"is no number at the end, after {value} at step {finite.steps[-1]:,.0f}"


def _baselines(history: History) -> list[tuple[float, str]]:
    """What raw pixels and the untrained model reach, in percent, where it was measured."""
    found = [(history.latest(f"{prefix}knn_top1"), name) for prefix, name in _BASELINES]
    return [(100 * value, name) for value, name in found if value is not None and math.isfinite(value)]


def draw_loss(history: History, per_epoch: int) -> Picture:
    """Loss in training and on held-out images."""
    lines = [
        Line(history.series("loss"), "training", INK),
        Line(history.series("val_loss"), "held out", STUDENT),
    ]
    return draw_lines(lines, per_epoch, "loss, nats", name="loss", title="Loss")


def draw_health(history: History, per_epoch: int) -> Picture:
    """The four numbers in which a collapse shows, with the bounds at which the alarm rings: of both above, together."""
    with house():
        figure = framed_figure(4.6, left=0.55, top=0.25, wspace=0.24, hspace=0.22)
        (entropy, kl), (spread, used) = figure.subplots(2, 2, sharex=True)
        _panel(entropy, history, ["entropy_ratio"], per_epoch, "teacher entropy / ln K")
        _panel(kl, history, ["kl"], per_epoch, "KL(teacher ‖ student), nats")
        _panel(spread, history, ["feature_std"], per_epoch, "feature spread")
        _panel(used, history, ["prototypes_used"], per_epoch, "prototypes used, share")
        if len(history.series("entropy_ratio")):
            entropy.set_ylim(0, 1.04)
            entropy.axhspan(UNIFORM_RATIO, 1.04, color=ALARM, alpha=0.12, linewidth=0)
            # A line only: trainings that are well may run below it for long, with a high divergence.
            entropy.axhline(DOMINANCE_RATIO, color=ALARM, linewidth=1, linestyle=_DOTTED)
            used.set_ylim(bottom=0)
            spread.set_ylim(bottom=0)
        if len(history.series("kl")):
            kl.set_ylim(bottom=0)
            kl.axhspan(0, MAX_DIVERGENCE, color=ALARM, alpha=0.12, linewidth=0)
        for axes in (spread, used):
            axes.set_xlabel("epoch")
    ratio, divergence = history.series("entropy_ratio"), history.series("kl")
    told = "No row yet."
    if len(ratio) and len(divergence):
        ratio_told, divergence_told = _ending(ratio, 1, ".2f"), _ending(divergence, 1, ".2f", " nats")
        told = f"Teacher entropy over ln K {ratio_told}; the divergence {divergence_told}."
    return Picture(name="health", title="Health", alt=told, figure=figure)


def draw_drive(history: History, per_epoch: int) -> Picture:
    """Learning rate, weight decay, teacher momentum and gradient norms."""
    with house():
        figure = framed_figure(4.6, left=0.55, top=0.25, wspace=0.24, hspace=0.22)
        (lr, momentum), (gradient, ratio) = figure.subplots(2, 2, sharex=True)
        _panel(lr, history, ["lr"], per_epoch, "learning rate")
        _panel(momentum, history, ["teacher_momentum"], per_epoch, "teacher momentum")
        _panel(gradient, history, ["grad_norm", "grad_norm_head"], per_epoch, "gradient norm", ("all", "head"))
        _panel(ratio, history, ["update_ratio"], per_epoch, "update over weight")
        for axes in (gradient, ratio):
            axes.set_xlabel("epoch")
            axes.set_ylim(bottom=0)
    return Picture(
        name="drive",
        title="Schedules and gradients",
        alt="Learning rate, teacher momentum, gradient norms and the ratio of update to weight over the epochs.",
        figure=figure,
    )


def draw_lines(lines: Sequence[Line], per_epoch: int, unit: str, *, name: str, title: str) -> Picture:
    """Curves in one picture, each named at its end."""
    shown = [line for line in lines if len(line.series.finite)]
    with house():
        figure = framed_figure(3.2)
        axes = figure.subplots()
        if shown:
            _draw(axes, shown, per_epoch)
            axes.set_ylabel(unit)
        else:
            note(axes, "no number to draw yet")
    ends = "; ".join(f"{line.name} {_ending(line.series, line.scale, '.4g')}" for line in shown)
    return Picture(name=name, title=title, alt=f"{title}: {ends or 'nothing to draw yet'}.", figure=figure)


def _draw(
    axes: Axes,
    lines: Sequence[Line],
    per_epoch: int,
    *,
    with_markers: bool = False,
    levels: Sequence[tuple[float, str]] = (),
) -> None:
    """`levels` are heights to compare with, of k = 20, dotted."""
    ends = []
    for line in lines:
        series = line.series.finite.thinned(MOST_POINTS)
        if not len(series):
            continue
        epochs, values = series.steps / per_epoch, line.scale * series.values
        few = (len(series) <= 40 and with_markers) or len(series) == 1
        axes.plot(epochs, values, line.style, color=line.colour, marker="o" if few else None, markersize=3.5)
        ends.append((float(epochs[-1]), float(values[-1]), line.name, line.colour))
    last = max((x for x, _, _, _ in ends), default=1.0) or 1.0
    for level, name in levels:
        axes.plot([0, last], [level, level], color=QUIET, linewidth=1, linestyle=_DOTTED, zorder=1)
        ends.append((last, level, name, QUIET))
    axes.margins(y=0.12)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, last * _ROOM)
    label_ends(axes, ends)


def _panel(
    axes: Axes, history: History, names: Sequence[str], per_epoch: int, title: str, labels: Sequence[str] = ()
) -> None:
    axes.set_title(title, fontsize=9)
    found = [history.series(name).finite.thinned(MOST_POINTS) for name in names]
    if not any(map(len, found)):
        note(axes, "not measured yet")
        return
    for number, series in enumerate(found):
        if len(series):
            colour = (INK, STUDENT)[number]
            axes.plot(series.steps / per_epoch, series.values, color=colour, linewidth=1.3)
            if labels:
                axes.text(0.98, 0.95 - 0.13 * number, labels[number], transform=axes.transAxes, color=colour,
                          ha="right", va="top", fontsize=9)  # fmt: skip
