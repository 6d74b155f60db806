"""A sweep as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dino_exp.errors import UsageError
from dino_exp.sweeps.outcome import Outcome
from dino_exp.sweeps.record import SweepRecord

_LESS_IS_BETTER = ("loss", "val_loss")
_ALSO = ("knn_top1", "knn_1shot", "loss")


def report_lines(record: SweepRecord, outcomes: Sequence[Outcome], metric: str) -> Iterator[str]:
    """The lines. Raises UsageError for a metric that no job has."""
    names = sorted({name for one in outcomes if one.record is not None for name in one.record.metrics})
    if names and metric not in names:
        raise UsageError(f"--metric {metric}: no job has it; there are {', '.join(names)}")
    settings = [dict(word.partition("=")[::2] for word in one.job.overrides) for one in outcomes]
    keys = dict.fromkeys(key for one in settings for key in one)
    swept = [key for key in keys if len({one.get(key) for one in settings}) > 1]
    metrics = [name for name in dict.fromkeys((metric, *_ALSO)) if name in names]
    yield f"# Sweep {record.name}"
    yield ""
    yield f"    python -m dino_exp.train --multirun {' '.join(record.typed)}"
    yield ""
    yield _line((*swept, *metrics, "state", "run"))
    yield _line(["---"] * (len(swept) + len(metrics) + 2))
    for number in sorted(range(len(outcomes)), key=lambda number: _rank(outcomes[number], metric)):
        one, chosen = outcomes[number], settings[number]
        yield _line(
            (
                *(chosen.get(key, "–") for key in swept),
                *(_value(one, name) for name in metrics),
                one.state or one.error or "not begun",
                one.run_key or "–",
            )
        )


def _rank(one: Outcome, metric: str) -> float:
    value = math.nan if one.record is None else one.record.metrics.get(metric, math.nan)
    if not math.isfinite(value):
        return math.inf
    return value if metric in _LESS_IS_BETTER else -value


def _value(one: Outcome, name: str) -> str:
    value = None if one.record is None else one.record.metrics.get(name)
    return "–" if value is None else f"{value:.4f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
