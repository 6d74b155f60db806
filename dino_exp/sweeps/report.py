"""A sweep as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from dino_exp.catalogue.query import natural_mode
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.typed import train_command
from dino_exp.errors import DinoExpError, UsageError
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.shape import WrongShapeError, whole
from dino_exp.sweeps.outcome import Outcome
from dino_exp.sweeps.record import SweepRecord

_ALSO = ("knn_top1", "knn_1shot", "loss")


def report_lines(record: SweepRecord, outcomes: Sequence[Outcome], metric: str) -> Iterator[str]:
    """The lines. Raises UsageError for a metric that no job has."""
    names = sorted({name for one in outcomes if one.record is not None for name in one.record.metrics})
    if names and metric not in names:
        raise UsageError(f"--metric {metric}: no job has it; there are {', '.join(names)}")
    swept, settings = swept_settings(outcomes)
    metrics = [name for name in dict.fromkeys((metric, *_ALSO)) if name in names]
    yield f"# Sweep {record.name}"
    yield ""
    yield f"    {train_command('--multirun', *record.options, *record.typed)}"
    yield ""
    yield _line((*swept, *metrics, "kept", "a kill costs at most", "state", "run"))
    yield _line(["---"] * (len(swept) + len(metrics) + 4))
    for number in sorted(range(len(outcomes)), key=lambda number: _rank(outcomes[number], metric)):
        one, chosen = outcomes[number], settings[number]
        yield _line(
            (
                *(chosen.get(key, "–") for key in swept),
                *(_value(one, name) for name in metrics),
                *_kept(one),
                one.state or one.error or "not begun",
                one.run_key or "–",
            )
        )


def swept_settings(outcomes: Sequence[Outcome]) -> tuple[list[str], list[dict[str, str]]]:
    """The keys by which the jobs differ, and the overrides of each job by key."""
    settings = [dict(word.partition("=")[::2] for word in one.job.overrides) for one in outcomes]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({one.get(key) for one in settings}) > 1], settings


def _rank(one: Outcome, metric: str) -> float:
    value = math.nan if one.record is None else one.record.metrics.get(metric, math.nan)
    if not math.isfinite(value):
        return math.inf
    return value if natural_mode(metric) == "min" else -value


def _value(one: Outcome, name: str) -> str:
    value = None if one.record is None else one.record.metrics.get(name)
    return "–" if value is None else f"{value:.4f}"


def _kept(one: Outcome) -> tuple[str, str]:
    """The bytes of its checkpoints, and the most steps between two saves, which a kill just before one costs."""
    if one.paths is None:
        return "–", "–"
    try:
        num_bytes = sum(info.bytes for info in CheckpointReader(one.paths.checkpoints).infos())
        saved = [whole(event.get("step")) for event in read_lines(one.paths.events) if event.get("kind") == "saved"]
    except (DinoExpError, OSError, WrongShapeError) as problem:
        return f"cannot be read: {problem}", "–"
    steps = [0, *saved, 0 if one.record is None else one.record.step]
    return f"{num_bytes / 1e6:.1f} MB", f"{max(b - a for a, b in pairwise(steps))} steps"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
