"""The time before a training in which its data is listed, checked or decoded: shown, and stopped by a signal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from dino_exp import build
from dino_exp.attempts.attempt import Attempt
from dino_exp.config.schema import Config
from dino_exp.dist.ranks import Ranks
from dino_exp.errors import DinoExpError
from dino_exp.loggers.bar import WorkBar
from dino_exp.runs.signals import SignalFlags

_BEAT_SECS = 10.0


class StoppedPreparingError(DinoExpError):
    """A stop signal came before the training began."""

    def __init__(self, signum: int) -> None:
        super().__init__("stopped while the data was being prepared; the same command begins with that again")
        self.exit_code = 128 + signum


@contextlib.contextmanager
def preparation(attempt: Attempt, ranks: Ranks) -> Iterator[build.Preparation]:
    """How the data of an attempt is prepared. Whoever prepares hears of a stop signal by StoppedPreparingError."""
    last_beat = time.monotonic()
    with WorkBar() as bar:

        def tell(word: str, done: int, total: int | None) -> None:
            nonlocal last_beat
            bar.tell(word, done, total)
            if attempt.signals.stop_signal is not None:
                raise StoppedPreparingError(attempt.signals.stop_signal)
            if time.monotonic() - last_beat > _BEAT_SECS:
                attempt.lock.beat()
                last_beat = time.monotonic()

        yield build.Preparation(
            cache=Path(attempt.config.paths.cache),
            workers=attempt.config.runtime.workers,
            ranks=ranks,
            progress=tell,
            is_new=attempt.record is None,
        )


def preparation_along(config: Config, ranks: Ranks, flags: SignalFlags) -> build.Preparation:
    """The same for a rank that is not the first: what rank 0 has done is found, or done again on a host of its own."""

    def tell(_word: str, _done: int, _total: int | None) -> None:
        if flags.stop_signal is not None:
            raise StoppedPreparingError(flags.stop_signal)

    return build.Preparation(cache=Path(config.paths.cache), workers=config.runtime.workers, ranks=ranks, progress=tell)
