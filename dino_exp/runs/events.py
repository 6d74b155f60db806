"""`events.jsonl`: what happened to a run, one durable line each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from dino_exp.runs.jsonl import JsonLines, whole_lines_bytes
from dino_exp.runs.jsontext import utc_text


class EventLog:
    """Appends events. Opened by the owner of the run's lock only."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        """Open the log, made if it is missing; a last line torn by a killed writer is cut. Raises OSError."""
        self._clock = clock
        self._appending = threading.Lock()  # the loop and the thread that saves both tell
        self._lines = JsonLines(path, whole_lines_bytes(path))

    def append(self, kind: str, **fields: object) -> None:
        """Write `{"time", "kind", **fields}` and return when it is on the disk. Raises OSError."""
        with self._appending:
            self._lines.append({"time": utc_text(self._clock()), "kind": kind, **fields})
            self._lines.sync()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._lines.close()
