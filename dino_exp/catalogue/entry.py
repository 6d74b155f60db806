"""What the catalogue knows of one run, read from the run's own files.

A stamp tells whether they have changed since: it is made of the times, sizes and numbers of `run.json` and of the
checkpoints folder, which every commit, drop and pin renames something in. So a catalogue that was not updated costs
reading what it missed, and is never believed against the files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from dino_exp.checkpoint.registry import Row, read_index
from dino_exp.checkpoint.store import Store
from dino_exp.config.canonical import left_out_values
from dino_exp.config.fields import walk_mapping
from dino_exp.config.stored import CANONICAL_NAME, MAX_BYTES
from dino_exp.errors import DinoExpError
from dino_exp.fsio import read_json_bounded
from dino_exp.runs.jsontext import Json, spell
from dino_exp.runs.key import parse_run_key
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record

RUNS = "runs"
_Code: TypeAlias = tuple[str | None, str | None]  # code_id, commit
MODEL_NAME = "model.name"  # no part of the identity, which is of values; the run key names it


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best checkpoint of one run and one code by one metric, for both directions. Only healthy, finite ones.

    `dirty`: whether that code had uncommitted changes; None where no attempt of the run says so, or git could not.
    """

    metric: str
    code_id: str | None
    commit: str | None
    dirty: bool | None
    highest: tuple[float, int]  # value, step
    lowest: tuple[float, int]


@dataclass(frozen=True, kw_only=True)
class RunEntry:
    """One run: `name` is its folder below `runs/`. `problem` says what of it could not be read.

    `settings` holds the identity settings by dotted key, and the model's name.
    """

    name: str
    stamp: str
    record: RunRecord | None = None
    problem: str | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    checkpoints: tuple[Row, ...] = ()

    def bests(self) -> Iterator[Best]:
        """For each metric and code, the best checkpoints; of equals the earlier step, as retention ranks them."""
        found: dict[tuple[str, _Code], list[tuple[float, int]]] = {}
        for row in self.checkpoints:
            for metric, value in row.info.metrics.items():
                if row.info.healthy and math.isfinite(value):
                    found.setdefault((metric, (row.code_id, row.git_commit)), []).append((value, row.info.step))
        attempts = () if self.record is None else self.record.attempts
        dirty: dict[_Code, bool | None] = {(one.code.id, one.code.commit): one.code.dirty for one in attempts}
        for (metric, code), values in found.items():
            code_id, commit = code
            yield Best(
                metric=metric,
                code_id=code_id,
                commit=commit,
                dirty=dirty.get(code),
                highest=max(values, key=lambda one: (one[0], -one[1])),
                lowest=min(values),
            )


def stamps(outputs: Path) -> dict[str, str]:
    """The stamp of every run below `outputs`, by name. Raises OSError where the folder cannot be read."""
    found = {}
    try:
        with os.scandir(outputs / RUNS) as folders:
            for folder in folders:
                stamp = stamp_of(folder.path)
                if stamp is not None and folder.name.isprintable():  # no run of ours, and a name that no text can hold
                    found[folder.name] = stamp
    except FileNotFoundError:
        return {}
    return found


def stamp_of(directory: str | Path) -> str | None:
    """The stamp of one run; None where there is none. Bare system calls: there may be ten thousand runs."""
    try:
        record = os.stat(f"{directory}/run.json")  # noqa: PTH116
    except OSError:
        return None
    try:
        checkpoints = os.stat(f"{directory}/checkpoints").st_mtime_ns  # noqa: PTH116
    except OSError:
        checkpoints = 0
    return f"{record.st_mtime_ns}.{record.st_size}.{record.st_ino}.{checkpoints}"


def read_entry(directory: Path, stamp: str) -> RunEntry:
    """What a run's files say now; `stamp` was taken before, so that a change meanwhile shows at the next look."""
    paths = RunPaths(directory)
    try:
        record = load_record(paths.run_json)
    except (DinoExpError, OSError) as damage:
        return RunEntry(name=directory.name, stamp=stamp, problem=str(damage))
    if record is None:
        return RunEntry(name=directory.name, stamp=stamp, problem=f"{paths.run_json}: it is gone")
    key = parse_run_key(record.run_key)
    assert key is not None  # a record of another key is not loaded
    settings, rows, problem = {MODEL_NAME: key.model}, tuple[Row, ...](), None
    try:
        settings |= dict(walk_mapping(read_json_bounded(directory / CANONICAL_NAME, max_bytes=MAX_BYTES, max_depth=16)))
        settings |= left_out_values(settings)
        store = Store(paths.checkpoints)
        store.refuse_links()
        rows = tuple(row for _, row in sorted(read_index(store).rows.items()))
    except (DinoExpError, OSError) as damage:
        problem = str(damage)
    return RunEntry(
        name=directory.name, stamp=stamp, record=record, problem=problem, settings=settings, checkpoints=rows
    )


def public(record: RunRecord, name: str) -> dict[str, Any]:
    """The fields that `runs list --json` promises, except where the run lies; `state` as it was recorded."""
    return {
        "run_key": record.run_key,
        "path": name,
        "state": record.state,
        "config_hash": record.config_hash,
        "group_hash": record.group_hash,
        "code": {"id": record.code.id, "commit": record.code.commit, "dirty": record.code.dirty},
        "data_fingerprint": record.data_fingerprint,
        "parent": record.parent,
        "attempts": len(record.attempts),
        "step": record.step,
        "epochs_done": record.epochs_done,
        "metrics": spell(record.metrics),
        "best": None if record.best is None else spell(vars(record.best)),
    }


def secs_per_step(record: RunRecord) -> float | None:
    """How long a step took in the newest attempt, start-up and evaluations included; None where it ended otherwise."""
    if not record.attempts or record.attempts[-1].outcome not in ("completed", "stopped"):
        return None
    last = record.attempts[-1]
    steps, secs = record.step - (last.resumed_from or 0), _secs(last.ended_at or "") - _secs(last.started_at)
    return secs / steps if steps > 0 and secs > 0 else None  # a clock that was set back tells nothing


def _secs(at: str) -> float:
    try:
        return datetime.fromisoformat(at).timestamp()
    except (ValueError, OverflowError):
        return math.nan
