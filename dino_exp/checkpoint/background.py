"""One piece of work at a time beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Runs work in a thread, or at once where `beside` is false; its result or its error is taken once.

    The thread is a daemon: a process that is told to abort does not wait for it.
    """

    def __init__(self, *, beside: bool) -> None:
        self.beside = beside
        self._thread: threading.Thread | None = None
        self._result: T | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], T]) -> None:
        """Begin `work`; what was begun before must have been taken."""
        assert self._thread is None, "one at a time"
        if not self.beside:
            self._result = work()
            return
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint-writer", daemon=True)
        self._thread.start()

    def take(self) -> T | None:
        """Wait for the work to end, and take its result; raises its error. None when there was none."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        result, error = self._result, self._error
        self._result = self._error = None
        if error is not None:
            raise error
        return result

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001 (handed over to whoever takes the result, who raises it)
            self._error = error
