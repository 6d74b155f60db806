"""How fast a save may write beside a training that wants the same processor and disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Pace:
    """Holds a writer to so many bytes a second, counted from the beginning of a save; None: no limit."""

    def __init__(self, max_bytes_per_sec: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes_per_sec, self._clock = max_bytes_per_sec, clock
        self._in_a_hurry = threading.Event()
        self._began_secs, self._num_bytes = 0.0, 0

    def begin(self) -> None:
        """A save begins."""
        self._in_a_hurry.clear()
        self._began_secs, self._num_bytes = self._clock(), 0

    def hurry(self) -> None:
        """No limit until the next `begin`. From any thread."""
        self._in_a_hurry.set()

    def wrote(self, num_bytes: int) -> None:
        """Count bytes, and wait until so many are due."""
        if self._max_bytes_per_sec is None:
            return
        self._num_bytes += num_bytes
        due_secs = self._began_secs + self._num_bytes / self._max_bytes_per_sec
        self.wait(max(0.0, due_secs - self._clock()))

    def wait(self, secs: float) -> None:
        """Sleep, or until somebody is in a hurry."""
        self._in_a_hurry.wait(secs)
