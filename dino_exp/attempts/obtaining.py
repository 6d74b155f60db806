"""The data set is fetched before an attempt is built on it, where the settings ask for that: by rank 0 alone."""

from __future__ import annotations

import time
from collections.abc import Callable

from dino_exp import build
from dino_exp.config.image_sections import AnyDataConfig
from dino_exp.dist.ranks import Ranks
from dino_exp.errors import DinoExpError
from dino_exp.loggers.bar import WorkBar
from dino_exp.runs.signals import SignalFlags

_SIGN_SECS = 5.0  # between two signs of life to whoever waits for this process
_MEGABYTE = 1_000_000


class StoppedFetchingError(DinoExpError):
    """A stop signal came while the data set was fetched."""

    def __init__(self, signum: int) -> None:
        super().__init__("stopped while the data set was fetched; nothing of it was kept, and the run has not begun")
        self.exit_code = 128 + signum


def fetch_data(data: AnyDataConfig, ranks: Ranks, *, beat: Callable[[], None], signals: SignalFlags) -> None:
    """On rank 0: fetch what is asked for and not there, with a bar on a terminal; all others wait in `await_data`.

    `beat` shows the owner of the run's lock to be alive. Raises StoppedFetchingError, DataError, OSError.
    """
    if not build.may_download(data):
        return
    shown = time.monotonic()
    with WorkBar() as bar:

        def tell(done: int, num_bytes: int) -> None:
            nonlocal shown
            bar.tell(f"fetching {data.name}, MB", done // _MEGABYTE, max(done, num_bytes) // _MEGABYTE)
            if signals.stop_signal is not None:
                raise StoppedFetchingError(signals.stop_signal)
            if time.monotonic() - shown >= _SIGN_SECS:
                shown = time.monotonic()
                beat()
                ranks.from_first(True)

        build.fetch_data(data, tell)
    ranks.from_first(False)


def await_data(data: AnyDataConfig, ranks: Ranks) -> None:
    """On every other rank: return when rank 0 has the data set. Raises OtherRankError, LostRankError."""
    while build.may_download(data) and ranks.from_first(False):
        pass
