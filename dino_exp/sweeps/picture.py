"""A sweep as pictures: a map of two settings, dots over one, and crosses where jobs failed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dino_exp.analysis.style import ALARM, HEAT, INK, STUDENT, Picture, bare, house, new_figure
from dino_exp.catalogue.query import natural_mode
from dino_exp.errors import UsageError
from dino_exp.sweeps.outcome import Outcome
from dino_exp.sweeps.report import last_value, swept_settings, value_of
from dino_exp.words import count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Place: TypeAlias = tuple[int, int]  # of a tick on each axis; 0 on one that is not there
_FAILED = "✕ failed or collapsed"


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """What was swept: names and ticks of the axes, the values found at each place, and where a job failed.

    `well`: the places whose values are of jobs that did not fail.
    """

    keys: tuple[str, ...]
    ticks: tuple[list[str], list[str]]
    values: dict[_Place, list[float]]
    failed: set[_Place]
    well: set[_Place]

    def mean(self, place: _Place) -> float:
        found = self.values.get(place)
        return statistics.fmean(found) if found else math.nan


def draw_sweep(outcomes: Sequence[Outcome], metric: str) -> Picture:
    """A map for two swept settings, dots for one, seeds aside; jobs that failed are crossed out.

    Of several jobs in one place (seeds, say) the mean is drawn. Raises UsageError for another number of settings, or
    where no job has the metric.
    """
    swept, _ = swept_settings(outcomes)
    keys = tuple(key for key in swept if key != "seed") or tuple(swept)
    if not 1 <= len(keys) <= 2:
        raise UsageError(f"--picture: {len(keys)} settings were swept ({', '.join(keys)}), expected 1 or 2")
    return _draw(outcomes, metric, keys)


def draw_setting(outcomes: Sequence[Outcome], metric: str, key: str) -> Picture:
    """Dots over one setting, whatever else was swept. Raises UsageError where no job has the metric."""
    return _draw(outcomes, metric, (key,))


def _draw(outcomes: Sequence[Outcome], metric: str, keys: tuple[str, ...]) -> Picture:
    grid = _grid(outcomes, metric, keys)
    with house():
        figure = new_figure(3.6 if len(keys) == 1 else 4.2)
        axes = figure.subplots()
        if len(keys) == 2:
            _draw_map(figure, axes, grid, metric)
        else:
            _draw_dots(axes, grid, metric)
        axes.set_xticks(range(len(grid.ticks[0])), grid.ticks[0])
        axes.set_xlabel(keys[0])
        if grid.failed:
            axes.set_title(_FAILED, color=ALARM, fontsize=9)
    name = "sweep-" + "-".join(key.replace(".", "-").replace("/", "-") for key in keys)
    return Picture(name=name, title=f"{metric} by {' and '.join(keys)}", alt=_alt(grid, metric), figure=figure)


def _grid(outcomes: Sequence[Outcome], metric: str, keys: tuple[str, ...]) -> _Grid:
    _, settings = swept_settings(outcomes)
    named = [[chosen.get(key, "–") for key in (*keys, "")][:2] for chosen in settings]
    ticks = (_ordered([one for one, _ in named]), _ordered([other for _, other in named]))
    well: dict[_Place, list[float]] = {}
    any_of: dict[_Place, list[float]] = {}
    failed = set()
    for one, (x, y) in zip(outcomes, named, strict=True):
        place = ticks[0].index(x), ticks[1].index(y)
        for values, value in ((well, value_of(one, metric)), (any_of, last_value(one, metric))):
            values.setdefault(place, []).extend([] if value is None or not math.isfinite(value) else [value])
        if one.state == "failed":  # not one that could not begin: its settings were refused, and nothing collapsed
            failed.add(place)
    if not any(any_of.values()):
        raise UsageError(f"--metric {metric}: no job has it, so there is nothing to draw")
    # Where every job failed, what they had come to is the picture of a collapse; beside others it does not count.
    values = {place: found or any_of[place] for place, found in well.items()}
    return _Grid(keys=keys, ticks=ticks, values=values, failed=failed, well={place for place in well if well[place]})


def _ordered(values: list[str]) -> list[str]:
    """Numbers by size, anything else in the order of the jobs."""
    different = list(dict.fromkeys(values))
    try:
        return sorted(different, key=float)
    except ValueError:
        return different


def _draw_map(figure: Figure, axes: Axes, grid: _Grid, metric: str) -> None:
    rows = [[grid.mean((x, y)) for x in range(len(grid.ticks[0]))] for y in range(len(grid.ticks[1]))]
    image = axes.imshow(rows, cmap=HEAT, aspect="auto", origin="lower")
    figure.colorbar(image, label=metric, pad=0.02).outline.set_visible(False)
    low, high = image.get_clim()
    for x, y in grid.values:
        mean = grid.mean((x, y))
        if math.isnan(mean):
            axes.text(x, y, "no value", ha="center", va="center", fontsize=9, color=INK)
            continue
        colour = "#ffffff" if mean < (low + high) / 2 else "#000000"
        axes.text(x, y, f"{mean:.3f}", ha="center", va="center", color=colour, fontsize=9)
    for x, y in grid.failed:
        _cross(axes, x, y + 0.27)
    axes.set_yticks(range(len(grid.ticks[1])), grid.ticks[1])
    axes.set_ylabel(grid.keys[1])
    bare(axes)


def _draw_dots(axes: Axes, grid: _Grid, metric: str) -> None:
    for (x, _), found in grid.values.items():
        axes.plot([x] * len(found), found, "o", color=STUDENT, alpha=0.55, markeredgewidth=0)
    axes.plot([x for x, _ in grid.values], list(map(grid.mean, grid.values)), "_", color=INK, markersize=24)
    low = axes.get_ylim()[0]
    for place in grid.failed:
        mean = grid.mean(place)
        _cross(axes, place[0], low if math.isnan(mean) else mean)
    axes.set_ylabel(metric)
    axes.margins(x=0.12)


def _cross(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], "x", color=ALARM, markersize=12, markeredgewidth=3, clip_on=False)


def _alt(grid: _Grid, metric: str) -> str:
    means = {place: grid.mean(place) for place in grid.well}
    failed = f"jobs failed at {count_text(len(grid.failed), 'place')}" if grid.failed else ""
    if not means:
        return f"Every job that has {metric} {failed.removeprefix('jobs ')}."
    lower = natural_mode(metric) == "min"
    best = (min if lower else max)(means, key=lambda place: means[place])
    where = ", ".join(f"{key} {grid.ticks[axis][best[axis]]}" for axis, key in enumerate(grid.keys))
    best_text = f"The {'lowest' if lower else 'highest'} mean {metric} is {means[best]:.4g}, with {where}"
    return "; ".join(filter(None, [best_text, failed])) + "."
