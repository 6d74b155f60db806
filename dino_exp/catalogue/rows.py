"""What the catalogue's tables hold of one run: plain values, which go between processes for little."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dino_exp.catalogue.entry import RunEntry, public, secs_per_step
from dino_exp.checkpoint.canonical import metrics_to_json

Values = tuple[Any, ...]


@dataclass(frozen=True)
class RunRows:
    """The rows of one run, values in the order of the columns (`database._TABLES`); `problem` as in its entry."""

    name: str
    problem: str | None
    run: Values
    bests: list[Values]
    checkpoints: list[Values]


def rows_of(entry: RunEntry) -> RunRows:
    """The rows of a run that was read."""
    return RunRows(
        name=entry.name,
        problem=entry.problem,
        run=_run_row(entry),
        bests=[
            (entry.name, best.metric, best.code_id, best.commit, best.dirty, *best.highest, *best.lowest)
            for best in entry.bests()
        ],
        checkpoints=list(_checkpoint_rows(entry)),
    )


def _run_row(entry: RunEntry) -> Values:
    record = entry.record
    if record is None:
        return (entry.name, entry.stamp, entry.problem, *(None,) * 15)
    parent = record.parent.get("run_key") if isinstance(record.parent, Mapping) else None
    return (
        entry.name,
        entry.stamp,
        entry.problem,
        record.state,
        record.attempts[0].started_at if record.attempts else None,
        record.step,
        record.config_hash,
        record.group_hash,
        record.code.commit,
        record.code.id,
        record.run_key,
        parent if isinstance(parent, str) else None,
        secs_per_step(record),
        record.schedule.horizon_steps,
        _scalar(entry.settings.get("seed")),
        json.dumps(record.tags),
        json.dumps(entry.settings),
        json.dumps(public(record, entry.name)),
    )


def _checkpoint_rows(entry: RunEntry) -> Iterator[Values]:
    for row in entry.checkpoints:
        info = row.info
        yield (
            *(entry.name, info.step, info.epoch, info.created_at, info.bytes, info.healthy, info.resumable),
            *(row.config_hash, row.git_commit, row.code_id, row.state_digest),
            json.dumps(metrics_to_json(info.metrics)),
        )


def _scalar(value: object) -> int | float | str | None:
    """What a column takes; SQLite holds whole numbers of 64 bits."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value if isinstance(value, int | float | str) else None
