"""`dino-exp runs compare`: one metric of several runs, in one table and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_exp.analysis.style import check_suffix
from dino_exp.catalogue.query import natural_mode
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption
from dino_exp.cli.show import plain, print_json, print_table
from dino_exp.config.stored import stored_values
from dino_exp.config.typed import setting_text
from dino_exp.errors import UsageError
from dino_exp.runs.find import find_run
from dino_exp.runs.jsontext import spell
from dino_exp.words import with_short_digests

if TYPE_CHECKING:
    from dino_exp.analysis.analyzer import CheckpointAnalyzer
    from dino_exp.analysis.figures.runs import RunCurve

_MOST_SETTINGS = 3  # that name a run in the picture
_NOT_NAMES = ("run.note", "run.tags")


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories, beginnings of keys, or `last`.")
    ],
    metric: Annotated[str, typer.Option("--metric", help="What is compared.")] = "knn_top1",
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the curves: .svg, .png or .pdf.")
    ] = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Compare a metric of several runs: the best first, and in a picture their curves.

    Runs are named by the first three settings in which they differ.

    \b
    Examples:
      dino-exp runs compare vit_nano-67b8 vit_nano-9f01
      dino-exp runs compare outputs/runs/* --metric loss --picture loss.svg
    """
    from dino_exp.analysis.analyzer import CheckpointAnalyzer

    if picture is not None:
        check_suffix(picture, "--picture")
    directories: dict[Path, Path] = {}
    for run in runs:
        directory = find_run(outputs, run)
        directories.setdefault(directory.resolve(), directory)  # one run may be spelled in several ways
    found = [CheckpointAnalyzer(directory) for directory in directories.values()]
    curves = list(map(_curve, found, _names(found), [metric] * len(found)))
    if not any(len(curve.series) or curve.best is not None for curve in curves):
        known = sorted({name for run in found for name in run.history.columns})
        raise UsageError(f"--metric {metric}: none of these runs has it; there are {', '.join(known) or 'none at all'}")
    order = sorted(range(len(found)), key=lambda place: _rank(curves[place].best, metric))
    if picture is not None:
        from dino_exp.analysis.figures.runs import draw_runs

        less_is_better = natural_mode(metric) == "min"
        shown = [replace(curves[place], name=with_short_digests(curves[place].name)) for place in order]
        draw_runs(shown, metric, less_is_better=less_is_better).save(picture)
    if as_json:
        print_json([_for_programs(found[place], curves[place], metric) for place in order])
        return
    lines = [_line(found[place], curves[place]) for place in order]
    columns = ("run", "differs in", "state", "epoch", f"best {metric}", "at step", "latest")
    print_table(columns, lines, right=columns[3:])
    if picture is not None:
        print(f"picture: {plain(str(picture))}")


def _curve(run: CheckpointAnalyzer, name: str, metric: str) -> RunCurve:
    from dino_exp.analysis.figures.runs import RunCurve

    series = run.history.series(metric)
    finite, own = series.finite, run.record.best
    found = list(zip(finite.values.tolist(), map(int, finite.steps), strict=True))
    if own is not None and own.metric == metric and math.isfinite(own.value):
        found.append((own.value, own.step))  # the state that a fork began with, which has no row here
    value, step = min(found, key=lambda one: (_rank(one[0], metric), one[1]), default=(None, None))
    return RunCurve(name=name, series=series, per_epoch=run.record.schedule.steps_per_epoch, best=value, best_step=step)


def _names(runs: Sequence[CheckpointAnalyzer]) -> list[str]:
    """By the settings in which they differ, or else by their directories."""
    settings = [stored_values(run.directory) for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [key for key in keys if len({str(one.get(key)) for one in settings}) > 1 and key not in _NOT_NAMES]
    more = f" and {len(differing) - _MOST_SETTINGS} more" if len(differing) > _MOST_SETTINGS else ""
    names = [
        ", ".join(f"{key.rpartition('.')[2]} {_value_text(one, key)}" for key in differing[:_MOST_SETTINGS]) + more
        for one in settings
    ]
    if len(set(names)) < len(runs) or not differing:
        places = [run.directory.name for run in runs]
        if len(set(places)) < len(runs):  # copies of a run
            places = [str(run.directory) for run in runs]
        names = [f"{name} {place}".strip() for name, place in zip(names, places, strict=True)]
    return names


def _value_text(settings: Mapping[str, Any], key: str) -> str:
    return setting_text(settings[key]) if key in settings else "–"


def _rank(best: float | None, metric: str) -> float:
    if best is None:
        return math.inf
    return best if natural_mode(metric) == "min" else -best


def _line(run: CheckpointAnalyzer, curve: RunCurve) -> tuple[str, ...]:
    epoch = f"{curve.series.steps[-1] / curve.per_epoch:.4g}" if len(curve.series) else "–"
    latest = f"{curve.series.values[-1]:.6g}" if len(curve.series) else "–"
    best, at = ("–", "–") if curve.best is None else (f"{curve.best:.6g}", str(curve.best_step))
    return run.record.run_key, with_short_digests(curve.name), run.state, epoch, best, at, latest


def _for_programs(run: CheckpointAnalyzer, curve: RunCurve, metric: str) -> dict[str, Any]:
    return {
        "run_key": run.record.run_key,
        "path": str(run.directory),
        "name": curve.name,
        "state": run.state,
        "metric": metric,
        "best": curve.best,
        "best_step": curve.best_step,
        "steps": [int(step) for step in curve.series.steps],
        "values": spell(curve.series.values.tolist()),
    }
