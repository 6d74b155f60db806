"""A sweep as a Markdown table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from dino_exp.catalogue.query import natural_mode
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.typed import train_command
from dino_exp.errors import DinoExpError, UsageError
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.shape import WrongShapeError, whole
from dino_exp.sweeps.outcome import Outcome, differing
from dino_exp.sweeps.record import SweepRecord

_ALSO = ("knn_top1", "knn_1shot", "loss")
_USUAL = ("knn_top1", "val_loss", "loss")


def report_lines(record: SweepRecord, outcomes: Sequence[Outcome], metric: str) -> Iterator[str]:
    """The lines. Raises UsageError for a metric that no job has."""
    metrics = metrics_shown(outcomes, metric)
    swept, settings = swept_settings(outcomes)
    yield f"# Sweep {record.name}"
    yield ""
    yield f"    {train_command(*record.words(record.typed))}"
    yield ""
    yield _line((*swept, *metrics, "kept", "a kill costs at most", "state", "run"))
    yield _line(["---"] * (len(swept) + len(metrics) + 4))
    for number in sorted(range(len(outcomes)), key=lambda number: rank(outcomes[number], metric)):
        one, chosen = outcomes[number], settings[number]
        yield _line(
            (
                *(chosen.get(key, "–") for key in swept),
                *(_value(one, name) for name in metrics),
                *_kept(one),
                one.shown_state,
                one.run_key or "–",
            )
        )
    named = differing([one.job.overrides for one in outcomes])
    reasons = [f"- {words}: {one.error}" for words, one in zip(named, outcomes, strict=True) if one.error]
    yield from ["", *reasons] if reasons else []


def usual_metric(outcomes: Sequence[Outcome]) -> str:
    """What the jobs are judged by themselves; where they are not, what most people look at that some job has."""
    records = [one.record for one in outcomes if one.record is not None]
    judged = Counter(record.best.metric for record in records if record.best is not None)
    names = (*(name for name, _ in judged.most_common(1)), *_USUAL)
    return next((name for name in names if any(name in record.metrics for record in records)), _USUAL[0])


def metrics_shown(outcomes: Sequence[Outcome], metric: str) -> list[str]:
    """The columns: what is compared, and what people want to see beside it. Raises UsageError where no job has it."""
    names = sorted({name for one in outcomes if one.record is not None for name in one.record.metrics})
    if names and metric not in names:
        raise UsageError(f"--metric {metric}: no job has it; there are {', '.join(names)}")
    return [name for name in dict.fromkeys((metric, *_ALSO)) if name in names]


def swept_settings(outcomes: Sequence[Outcome]) -> tuple[list[str], list[dict[str, str]]]:
    """The keys by which the jobs differ, and the overrides of each job by key."""
    settings = [dict(word.partition("=")[::2] for word in one.job.overrides) for one in outcomes]
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({one.get(key) for one in settings}) > 1], settings


def rank(one: Outcome, metric: str) -> float:
    """A key to sort jobs by, the best first and those without a value, or that failed, last."""
    value = value_of(one, metric)
    if value is None or not math.isfinite(value):
        return math.inf
    return value if natural_mode(metric) == "min" else -value


def value_of(one: Outcome, name: str) -> float | None:
    """The latest value of a metric; that of a job that failed does not count."""
    return None if one.has_failed else last_value(one, name)


def last_value(one: Outcome, name: str) -> float | None:
    """The latest value of a metric, of a job that failed too."""
    return None if one.record is None else one.record.metrics.get(name)


class Kept(NamedTuple):
    """Bytes of a job's checkpoints, and the most steps between two saves, which a kill just before one costs."""

    num_bytes: int | None = None
    most_lost_steps: int | None = None
    problem: str | None = None


def kept_of(one: Outcome) -> Kept:
    """Look at the checkpoints of a job's run."""
    if one.paths is None:
        return Kept()
    try:
        num_bytes = sum(info.bytes for info in CheckpointReader(one.paths.checkpoints).infos())
        saved = [whole(event.get("step")) for event in read_lines(one.paths.events) if event.get("kind") == "saved"]
    except (DinoExpError, OSError, WrongShapeError) as problem:
        return Kept(problem=str(problem))
    is_fork = one.record is not None and one.record.parent is not None  # its first save is the state of its parent
    steps = [*([] if is_fork else [0]), *saved, 0 if one.record is None else one.record.step]
    return Kept(num_bytes, max((b - a for a, b in pairwise(steps)), default=0))


def _value(one: Outcome, name: str) -> str:
    value = value_of(one, name)
    return "–" if value is None else f"{value:.4f}"


def _kept(one: Outcome) -> tuple[str, str]:
    kept = kept_of(one)
    if kept.problem is not None:
        return f"cannot be read: {kept.problem}", "–"
    if kept.num_bytes is None:
        return "–", "–"
    return f"{kept.num_bytes / 1e6:.1f} MB", f"{kept.most_lost_steps} steps"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
