"""Curves of several runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dino_exp.analysis.figures.curves import MOST_POINTS
from dino_exp.analysis.figures.labels import label_ends
from dino_exp.analysis.history import Series
from dino_exp.analysis.style import QUIET, SERIES, Picture, framed_figure, house, note

_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MOST_NAMED = len(SERIES) * len(_STYLES)  # of more lines than these only the best few are named
_BEST_NAMED = 6
_MOST_CHARS = 32
_CHAR_INCHES = 0.075  # of a name, beside the axes


@dataclass(frozen=True, kw_only=True, eq=False)
class RunCurve:
    """One run: its name in the picture, its curve, and its best value with the step of it, None where it has none."""

    name: str
    series: Series
    per_epoch: int
    best: float | None
    best_step: int | None


def draw_runs(curves: Sequence[RunCurve], metric: str, *, less_is_better: bool) -> Picture:
    """`metric` over the epochs. With very many runs all but the best few are grey."""
    shown = [curve for curve in curves if len(curve.series.finite)]
    ranked = sorted(
        (curve for curve in shown if curve.best is not None),
        key=lambda curve: curve.best or 0.0,
        reverse=not less_is_better,
    )
    named = shown if len(shown) <= MOST_NAMED else ranked[:_BEST_NAMED]
    with house():
        longest = max((len(_short(curve.name)) for curve in named), default=0)
        figure = framed_figure(3.4 if len(named) <= 8 else 4.6, left=0.8, right=0.2 + _CHAR_INCHES * longest)
        axes = figure.subplots()
        ends = []
        for curve in sorted(shown, key=lambda curve: curve in named):
            series = curve.series.finite.thinned(MOST_POINTS)
            colour, style = _look(named.index(curve)) if curve in named else (QUIET, "-")
            epochs = series.steps / curve.per_epoch
            few = "o" if len(series) <= 40 else None
            axes.plot(epochs, series.values, linestyle=style, color=colour, marker=few, markersize=3,
                      alpha=1.0 if curve in named else 0.35, linewidth=1.6 if curve in named else 0.9)  # fmt: skip
            if curve in named:
                ends.append((float(series.values[-1]), _short(curve.name), colour))
        if not shown:
            note(axes, f"none of these runs has {metric} yet")
        else:
            axes.set_xlabel("epoch")
            axes.set_ylabel(metric)
            axes.margins(y=0.1)
            last = max(float(curve.series.finite.steps[-1]) / curve.per_epoch for curve in shown)
            label_ends(axes, [(last, *end) for end in ends])
    return Picture(name="runs", title=f"{metric} of {len(curves)} runs", alt=_alt(ranked, metric), figure=figure)


def _short(name: str) -> str:
    """Both ends: paths differ in the one, settings in the other."""
    half = _MOST_CHARS // 2
    return name if len(name) <= _MOST_CHARS else f"{name[: half - 1]}…{name[-half:]}"


def _look(place: int) -> tuple[str, str | tuple[float, tuple[float, ...]]]:
    return SERIES[place % len(SERIES)], _STYLES[place // len(SERIES)]


def _alt(ranked: Sequence[RunCurve], metric: str) -> str:
    if not ranked:
        return f"No run has {metric} yet."
    return f"The best {metric} is {ranked[0].best:.4g}, of {ranked[0].name}."
