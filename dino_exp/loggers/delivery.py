"""Hands the rows of `metrics.jsonl` on to a tracker, in a thread of its own, whatever becomes of the tracker.

The file is the queue: it is on the disk, a resume cuts it to its checkpoint, and training writes the same rows again.
A tracker knows by itself the last step that it has. So nothing that is kept here has to survive a kill: a new
attempt asks the tracker, and goes on from there.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dino_exp.errors import DinoExpError, LockedError

log = logging.getLogger(__name__)

Row = Mapping[str, Any]
ReadRows = Callable[[int], tuple[list[Any], int]]
"""The rows after a position of the file (0: its beginning), and the position after them; no rows: none is there yet."""

_MAX_PROBLEM_CHARS = 300


class Tracker(Protocol):
    """A place where people look at curves. Its methods are called by one thread, and raise what they like."""

    @property
    def name(self) -> str:
        """What to call it in a message."""

    @property
    def remedy(self) -> str:
        """How rows that it did not get by the end of an attempt will get there."""

    def open(self) -> int | None:
        """Get in touch, again after a failure; the last step that it has, None where it has none."""

    def deliver(self, rows: Sequence[Row]) -> None:
        """Take rows of rising steps. After an error it is opened anew, and asked again what it has."""

    def close(self, secs: float, outcome: str) -> None:
        """Come to an end within about `secs`. `outcome`: how the attempt ended, in the words of `run.json`."""

    def abandon(self) -> None:
        """Called by another thread where it did not: let nothing of it hold up the end of the program."""


def deliver_command(run: Path, *choice: str) -> str:
    """The command that brings the rows of a run to the tracker of these options."""
    return shlex.join(["dino-exp", "runs", "deliver", str(run), *choice])


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long to wait: between two looks at the file, and after a failure, at first and at most. Seconds."""

    poll_secs: float = 1.0
    first_pause_secs: float = 5.0
    longest_pause_secs: float = 300.0

    def after_failures(self, number: int) -> float:
        """The pause after so many failures in a row."""
        return min(self.longest_pause_secs, self.first_pause_secs * 2.0 ** min(number - 1, 30))


class Delivery:
    """One tracker and the thread that serves it.

    `tell(kind, text)` is called when the tracker fails (once, however often that is tried), when it works again, and
    at the end where rows are missing. `guard` raises LockedError when the run is another's now: it ends in silence.
    """

    def __init__(
        self,
        tracker: Tracker,
        read: ReadRows,
        *,
        tell: Callable[[str, str], None],
        guard: Callable[[], None],
        pace: Pace = Pace(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tracker, self._read, self._tell, self._guard, self._pace = tracker, read, tell, guard, pace
        self._clock = clock
        self._ending = threading.Event()
        self._deadline_secs, self._outcome = 0.0, "running"
        self._is_open, self._is_lost, self._was_asked = False, False, False
        self._is_finished, self._is_left = False, False
        self._num_failures = 0
        self._position = 0
        self._last_step: int | None = None
        self._thread = threading.Thread(target=self._work, name=f"delivery to {tracker.name}", daemon=True)

    def start(self) -> None:
        """Begin to hand on, from the first row that the tracker has not."""
        self._thread.start()

    def ask_to_end(self, secs: float, outcome: str) -> None:
        """Let the thread hand on what there is and come to an end within `secs`; asking again changes nothing."""
        if not self._ending.is_set():
            self._deadline_secs, self._outcome = self._clock() + secs, outcome
            self._ending.set()

    def finish(self) -> int:
        """Wait for the end that was asked for, no longer than was said; say so where rows are left. How many."""
        self._thread.join(max(0.0, self._deadline_secs - self._clock()))
        if self._is_finished:
            return 0
        self._is_finished = True
        self._is_left = self._thread.is_alive()  # from now on it says nothing, whatever it still does
        if self._is_left:
            self.tracker.abandon()
        missing = 0 if self._is_lost else self._num_missing()
        if missing:
            lacks = f"has not got {missing}" if self._was_asked else f"could not be asked, and may lack up to {missing}"
            self._tell(
                "tracker_behind", f"{self.tracker.name} {lacks} of the rows of metrics.jsonl: {self.tracker.remedy}"
            )
        elif self._is_left:
            log.info("%s did not come to an end in time", self.tracker.name)
        return missing

    def _work(self) -> None:
        pause = 0.0
        while True:
            is_ending = self._ending.wait(pause)
            try:
                self._hand_on()
            except LockedError:
                self._is_lost = True
                break
            except Exception as problem:  # noqa: BLE001  (of a library that is not ours; told, and tried again)
                pause = self._failed(problem)
            else:
                self._works()
                pause = self._pace.poll_secs
            if is_ending:
                break
        self._close()

    def _hand_on(self) -> None:
        if not self._is_open:
            self._guard()
            self._last_step, self._position = self.tracker.open(), 0
            self._is_open = self._was_asked = True
        while True:
            rows, position = self._read(self._position)
            if position == self._position:
                return
            fresh = [row for row in rows if self._is_fresh(row)]
            if fresh:
                self._guard()
                self.tracker.deliver(fresh)
                self._last_step = fresh[-1]["step"]
            self._position = position

    def _is_fresh(self, row: Row) -> bool:
        step = row.get("step")
        return isinstance(step, int) and (self._last_step is None or step > self._last_step)

    def _failed(self, problem: Exception) -> float:
        self._is_open = False
        self._num_failures += 1
        text = f"{type(problem).__name__}: {problem}".splitlines()[0][:_MAX_PROBLEM_CHARS]
        log.info("%s failed, %d times in a row: %s", self.tracker.name, self._num_failures, text)
        if self._num_failures == 1 and not self._is_left:
            self._tell(
                "tracker_down",
                f"{self.tracker.name} does not take the metrics ({text}); training goes on, metrics.jsonl keeps every "
                "row, and it is tried again from time to time",
            )
        return self._pace.after_failures(self._num_failures)

    def _works(self) -> None:
        if self._num_failures and not self._is_left:
            self._tell("tracker_up", f"{self.tracker.name} takes the metrics again")
        self._num_failures = 0

    def _close(self) -> None:
        try:
            self.tracker.close(max(0.0, self._deadline_secs - self._clock()), self._outcome)
        except Exception as problem:
            log.info("%s did not end well", self.tracker.name, exc_info=problem)
            if not self._num_failures and not self._is_left:  # rows that it had taken may not have come through
                self._tell("tracker_behind", f"{self.tracker.name} did not end well: {self.tracker.remedy}")

    def _num_missing(self) -> int:
        position, missing = self._position, 0
        try:
            while True:
                rows, after = self._read(position)
                if after == position:
                    return missing
                missing += sum(map(self._is_fresh, rows))
                position = after
        except (OSError, DinoExpError) as problem:
            log.info("rows for %s could not be counted: %s", self.tracker.name, problem)
            return missing


def numbers_of(row: Row) -> dict[str, float]:
    """The numbers of a row but for its step, clock readings as `wall/<name>`, words for NaN and infinity among them."""
    flat = {name: value for name, value in row.items() if name not in ("step", "wall")}
    flat |= {f"wall/{name}": value for name, value in row.get("wall", {}).items()}
    words = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
    found = {name: words.get(value) if isinstance(value, str) else value for name, value in flat.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
