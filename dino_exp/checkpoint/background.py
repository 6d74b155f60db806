"""One piece of work at a time beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_HEED_SECS = 0.1  # so long may a signal go unheeded by whoever waits


class Background(Generic[T]):
    """Runs work in a thread, or at once where `beside` is false; its result or its error is taken once.

    The thread is a daemon: a process that is told to abort does not wait for it.
    """

    def __init__(self, *, beside: bool) -> None:
        self.beside = beside
        # Not `Thread.join`: in Python 3.11 and 3.12 a thread whose join was interrupted counts as ended.
        self._ended: threading.Event | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def is_held(self) -> bool:
        """Whether work was begun beside, and its result was not taken yet."""
        return self._ended is not None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._ended is not None and not self._ended.is_set()

    def start(self, work: Callable[[], T]) -> None:
        """Begin `work`; what was begun before must have been taken. Raises RuntimeError where no thread can be."""
        assert self._ended is None, "one at a time"
        if not self.beside:
            self._result = work()
            return
        ended = self._ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(work, ended), name="checkpoint-writer", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # nothing was begun
            self._ended = None
            raise

    def wait(self, secs: float) -> bool:
        """Whether the work under way, if there is any, ends within so many seconds."""
        return self._ended is None or self._ended.wait(secs)

    def take(self) -> T | None:
        """Wait for the work to end, and take its result; raises its error. None when there was none.

        When the wait is interrupted, the work goes on, and is still to be taken.
        """
        if self._ended is not None:
            # A wait without end sleeps through a signal that arrived just before it, or in another thread.
            while not self._ended.wait(_HEED_SECS):
                pass
            self._ended = None
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        return result

    def _run(self, work: Callable[[], T], ended: threading.Event) -> None:
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001 (handed over to whoever takes the result, who raises it)
            self._error = error
        finally:
            ended.set()
