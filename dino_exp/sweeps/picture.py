"""A sweep over one or two settings as a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from dino_exp.errors import UsageError
from dino_exp.sweeps.outcome import Outcome
from dino_exp.sweeps.report import swept_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_Place: TypeAlias = tuple[int, int]  # of a tick on each axis; 0 on one that is not there


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """What was swept: names and ticks of the axes, the values found at each place, and where a job failed."""

    keys: tuple[str, ...]
    ticks: tuple[list[str], list[str]]
    values: dict[_Place, list[float]]
    failed: set[_Place]

    def mean(self, place: _Place) -> float:
        found = self.values.get(place)
        return statistics.fmean(found) if found else math.nan


def draw(outcomes: Sequence[Outcome], metric: str, path: Path) -> None:
    """A map for two swept settings, dots for one; jobs that failed are crossed out. The suffix of `path` is the format.

    Of several jobs in one place (seeds, say) the mean is drawn. Raises UsageError for another number of settings, or
    where no job has the metric, OSError.
    """
    grid = _grid(outcomes, metric)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    if len(grid.keys) == 2:
        _draw_map(figure, axes, grid, metric)
    else:
        _draw_dots(axes, grid, metric)
    axes.set_xticks(range(len(grid.ticks[0])), grid.ticks[0])
    axes.set_xlabel(grid.keys[0])
    if grid.failed:
        axes.set_title("× failed or collapsed", fontsize=10, loc="left")
    figure.savefig(path, dpi=_DPI)


def _grid(outcomes: Sequence[Outcome], metric: str) -> _Grid:
    swept, settings = swept_settings(outcomes)
    keys = tuple(key for key in swept if key != "seed") or tuple(swept)
    if not 1 <= len(keys) <= 2:
        raise UsageError(f"--picture: {len(keys)} settings were swept ({', '.join(keys)}), expected 1 or 2")
    named = [[chosen.get(key, "–") for key in (*keys, "")][:2] for chosen in settings]
    ticks = (list(dict.fromkeys(one for one, _ in named)), list(dict.fromkeys(other for _, other in named)))
    values: dict[_Place, list[float]] = {}
    failed = set()
    for one, (x, y) in zip(outcomes, named, strict=True):
        place = ticks[0].index(x), ticks[1].index(y)
        value = math.nan if one.record is None else one.record.metrics.get(metric, math.nan)
        values.setdefault(place, []).extend([value] if math.isfinite(value) else [])
        if one.has_failed:
            failed.add(place)
    if not any(values.values()):
        raise UsageError(f"--metric {metric}: no job has it, so there is nothing to draw")
    return _Grid(keys=keys, ticks=ticks, values=values, failed=failed)


def _draw_map(figure: Figure, axes: Axes, grid: _Grid, metric: str) -> None:
    rows = [[grid.mean((x, y)) for x in range(len(grid.ticks[0]))] for y in range(len(grid.ticks[1]))]
    figure.colorbar(axes.imshow(rows, cmap="viridis", aspect="auto", origin="lower"), label=metric)
    box = {"facecolor": "black", "alpha": 0.5, "edgecolor": "none", "pad": 1.5}
    for x, y in grid.values:
        text = "no value" if math.isnan(grid.mean((x, y))) else f"{grid.mean((x, y)):.3f}"
        axes.text(x, y - 0.08, text, ha="center", va="top", color="white", fontsize=9, bbox=box)
    for x, y in grid.failed:
        _cross(axes, x, y + 0.2)
    axes.set_yticks(range(len(grid.ticks[1])), grid.ticks[1])
    axes.set_ylabel(grid.keys[1])


def _draw_dots(axes: Axes, grid: _Grid, metric: str) -> None:
    for (x, _), found in grid.values.items():
        axes.plot([x] * len(found), found, "o", color="tab:blue", alpha=0.6)
    axes.plot([x for x, _ in grid.values], list(map(grid.mean, grid.values)), "_", color="black", markersize=24)
    for place in grid.failed:
        _cross(axes, place[0], grid.mean(place))
    axes.set_ylabel(metric)


def _cross(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], "x", color="red", markersize=14, markeredgewidth=3)
