"""The rows of `metrics.jsonl` as columns, also while a training writes them."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_exp.fsio import DamagedFileError
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.jsontext import number

Values = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Series:
    """One metric: the steps at which it was written, and its values there, which may be NaN or infinite."""

    steps: Values
    values: Values

    @property
    def finite(self) -> Series:
        """Only what can be drawn."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, most: int) -> Series:
        """At most about so many points, with the lowest and highest of each stretch, so that no peak is lost."""
        if len(self) <= most:
            return self
        edges = np.linspace(0, len(self), most // 2 + 1).astype(int)
        chosen: set[int] = {0, len(self) - 1}
        for start, end in itertools.pairwise(edges):
            part = self.values[start:end]
            if np.isfinite(part).any():
                chosen |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        places = np.array(sorted(chosen))
        return Series(self.steps[places], self.values[places])


@dataclass(frozen=True)
class History:
    """All metrics of a run by name. `problem` says why there are no more of them."""

    columns: Mapping[str, Series]
    num_rows: int = 0
    problem: str | None = None
    wall: Mapping[str, Series] = field(default_factory=dict)

    def series(self, name: str) -> Series:
        """One metric; empty where it was never written."""
        return self.columns.get(name, _EMPTY)

    def latest(self, name: str) -> float | None:
        """Its last value; None where it was never written."""
        found = self.series(name)
        return float(found.values[-1]) if len(found) else None


_EMPTY = Series(np.empty(0), np.empty(0))


def read_history(path: Path) -> History:
    """Read the rows that are whole. A damaged file gives those before the damage, and says so. Raises OSError."""
    columns: dict[str, tuple[array[float], array[float]]] = {}
    wall: dict[str, tuple[array[float], array[float]]] = {}
    num_rows, problem = 0, None
    try:
        for row in read_lines(path):
            step = row.get("step")
            if type(step) is not int:
                problem = f"{path}, line {num_rows + 1}: no step"
                break
            num_rows += 1
            _add(columns, step, row)
            clock = row.get("wall")
            if isinstance(clock, dict):
                _add(wall, step, clock)
    except DamagedFileError as damage:
        problem = str(damage)
    return History(_series(columns), num_rows, problem, _series(wall))


def _add(columns: dict[str, tuple[array[float], array[float]]], step: int, row: Mapping[str, Any]) -> None:
    for name, value in row.items():
        found = number(value)
        if found is None or name == "step":
            continue
        steps, values = columns.setdefault(name, (array("d"), array("d")))
        steps.append(step)
        values.append(found)


def _series(columns: Mapping[str, tuple[array[float], array[float]]]) -> dict[str, Series]:
    return {name: Series(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}
