"""Worker processes that survive no trainer and hear no signal: how they are started."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker

# Launchers send these to a whole process group. Only the training itself may answer.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def ignore_signals() -> None:
    """What a worker does first."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_held_back(preload: Sequence[str]) -> Iterator[None]:
    """Start the fork server, which imports `preload`, so that no signal to the process group can end it, now or later.

    It inherits the blocked mask, and its children inherit it from the server. What arrives here
    meanwhile is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # again, because the start above unblocks two
        forkserver.set_forkserver_preload(list(preload))
        forkserver.ensure_running()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
