"""One piece of work beside the training: its result and its error, and signals to whoever waits for it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import pytest

from dino_exp.checkpoint.background import Background


def test_work_hands_over_its_result_or_its_error_once() -> None:
    def work(error: BaseException | None) -> Callable[[], int]:
        def run() -> int:
            if error is not None:
                raise error
            return 7

        return run

    for beside in (True, False):
        background: Background[int] = Background(beside=beside)
        background.start(work(None))
        assert (background.take(), background.take()) == (7, None)
    beside_only: Background[int] = Background(beside=True)
    beside_only.start(work(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        beside_only.take()
    assert beside_only.take() is None


def test_a_signal_that_another_thread_received_reaches_whoever_waits() -> None:
    """Handlers run in the main thread, which a signal to another one does not wake. A second Ctrl-C must abort."""
    handled = threading.Event()
    previous = signal.signal(signal.SIGUSR1, lambda *_: handled.set())
    background: Background[bool] = Background(beside=True)

    def work() -> bool:
        time.sleep(0.2)  # the main thread waits by now
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        return handled.wait(10)

    try:
        background.start(work)
        assert background.take()
    finally:
        signal.signal(signal.SIGUSR1, previous)
