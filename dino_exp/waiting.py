"""Calls that nobody can interrupt, and how long to wait for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(secs: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError when neither comes in time.

    It runs in a thread of its own, which is left to itself then, and which the end of the process does not wait for.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:  # noqa: BLE001 (raised again below, in the thread that asked)
            answers.put((None, error))

    threading.Thread(target=answer, name="waited-for", daemon=True).start()
    try:
        value, error = answers.get(timeout=secs)
    except queue.Empty:
        raise TimeoutError(f"no answer within {secs:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # of a call that raised nothing
