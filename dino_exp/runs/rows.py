"""`metrics.jsonl`: one row a logging step, no row twice and none missing after any number of kills.

A checkpoint records the position of the file at its step, once those rows are on the disk. A resume cuts the
file there, and training writes the same rows again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dino_exp.config.typed import override, train_command
from dino_exp.fsio import LOCAL, DamagedFileError
from dino_exp.runs.jsonl import JsonLines, count_lines, last_line, parse_line


@dataclass(frozen=True, kw_only=True)
class RowPosition:
    """How much of the file belongs to a step: rows, and the bytes that they take."""

    num_rows: int
    num_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_rows <= self.num_bytes:
            raise ValueError(f"rows: expected 0 <= num_rows <= num_bytes, got {self.num_rows} and {self.num_bytes}")


START = RowPosition(num_rows=0, num_bytes=0)


class Rows(Protocol):
    """Where the loop's rows go."""

    @property
    def num_rows(self) -> int:
        """Rows so far, those of earlier attempts included."""

    @property
    def position(self) -> RowPosition:
        """How much was written so far."""

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row."""

    def sync(self) -> RowPosition:
        """Return the position once every row up to it is on the disk."""


def last_step(path: Path) -> int | None:
    """The step of the last whole row of a file; None where there is none, or none that can be read. Raises OSError."""
    line = last_line(path)
    if line is None:
        return None
    try:
        step = parse_line(line, str(path)).get("step")
    except DamagedFileError:  # of interest to those who show rows, who say so
        return None
    return step if type(step) is int and step >= 0 else None


class RowCount:
    """Rows that rank 0 writes, counted by another one, which goes by the same number."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    @property
    def position(self) -> RowPosition:
        """Nothing of it goes into a manifest."""
        return RowPosition(num_rows=self.num_rows, num_bytes=self.num_rows)

    def append(self, row: Mapping[str, object]) -> None:
        """Count one."""
        self.num_rows += 1

    def sync(self) -> RowPosition:
        """Nothing is on a disk of this rank."""
        return self.position


class RowWriter:
    """Writes rows. Nothing is opened before `open_at`.

    `reached`: the step of the last row that was there then, cut or not; None where none was.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reached: int | None = None
        self._num_rows = 0
        self._lines: JsonLines | None = None

    def open_at(self, num_rows: int, num_bytes: int) -> None:
        """Open the file and cut it to the position that a checkpoint recorded; (0, 0) for a new run.

        Raises DamagedFileError, and changes nothing, when the file has not these rows any more; OSError.
        """
        position = RowPosition(num_rows=num_rows, num_bytes=num_bytes)
        self._check(position)
        self.close()
        self.reached = last_step(self.path)
        self._num_rows = position.num_rows
        self._lines = JsonLines(self.path, position.num_bytes)

    @property
    def num_rows(self) -> int:
        """Rows in the file, those of earlier attempts included."""
        return self._num_rows

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row; numbers that are not finite become words (nan, inf, -inf). Durable after `sync`."""
        self._opened().append(row)
        self._num_rows += 1

    @property
    def position(self) -> RowPosition:
        """How much was written so far."""
        return RowPosition(num_rows=self._num_rows, num_bytes=self._opened().num_bytes)

    def sync(self) -> RowPosition:
        """Return the position once every row up to it is on the disk. From any thread."""
        position = self.position
        self._opened().sync()
        return position

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _opened(self) -> JsonLines:
        assert self._lines is not None, "rows are written after open_at"
        return self._lines

    def _check(self, position: RowPosition) -> None:
        found_bytes = LOCAL.size(self.path) or 0
        if found_bytes < position.num_bytes:
            raise self._damage(position, f"{found_bytes} bytes")
        if position.num_bytes:
            found_rows, is_whole = count_lines(self.path, position.num_bytes)
            if found_rows != position.num_rows or not is_whole:
                torn = "" if is_whole else " and a torn one"
                raise self._damage(position, f"{found_rows} rows{torn} in the first {position.num_bytes} bytes")

    def _damage(self, position: RowPosition, found: str) -> DamagedFileError:
        return DamagedFileError(
            f"{self.path}: found {found}, but the checkpoint was saved after {position.num_rows} rows in "
            f"{position.num_bytes} bytes. Put the file back, or go on in a new run: "
            f"`{train_command(override('fork', self.path.parent))}`"
        )
