"""What all ranks must know alike before they go on: signals that reached some of them, and the clock of the first.

Shapes: none; a row of a few numbers, added up over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from dino_exp.dist.ranks import Ranks
from dino_exp.runs.signals import STOP_SIGNALS, SignalFlags


class Signals(Protocol):
    """Signals as the loop sees them."""

    @property
    def stop_signal(self) -> int | None:
        """The signal that asks to save and stop."""

    def take_save_request(self) -> bool:
        """Whether a save was asked for since the last call."""

    def agree(self, of_first: Sequence[float] = ()) -> Sequence[float]:
        """Learn of the signals of all ranks. Returns what rank 0 gave, which must be as many numbers on each."""


class AgreedSignals:
    """Signals of all ranks; known, alike on each, from the call of `agree` on that follows them."""

    def __init__(self, flags: SignalFlags, ranks: Ranks) -> None:
        self._flags, self._ranks = flags, ranks
        self._save_wanted = False
        self.stop_signal: int | None = None

    def take_save_request(self) -> bool:
        """Whether a save was asked for, of any rank, since the last call."""
        wanted, self._save_wanted = self._save_wanted, False
        return wanted

    def agree(self, of_first: Sequence[float] = ()) -> Sequence[float]:
        """One collective: the signals of all ranks, and the numbers of rank 0."""
        asked = [float(self._flags.stop_signal == number) for number in STOP_SIGNALS]
        wanted = float(self._flags.take_save_request())
        given = of_first if self._ranks.place.is_first else [0.0] * len(of_first)
        row: list[float] = self._ranks.add_(torch.tensor([*asked, wanted, *given], dtype=torch.float64)).tolist()
        found = [number for number, count in zip(STOP_SIGNALS, row, strict=False) if count]
        if self.stop_signal is None and found:
            self.stop_signal = found[0]
        self._save_wanted |= row[len(STOP_SIGNALS)] > 0
        return row[len(STOP_SIGNALS) + 1 :]


def on_all(ranks: Ranks, work: Callable[[], object]) -> None:
    """Do what may fail on one rank alone. If it does, that rank raises its error, and the others an OtherRankError."""
    error: Exception | None = None
    try:
        work()
    except Exception as problem:  # noqa: BLE001 (raised by `all_well`, on every rank)
        error = problem
    ranks.all_well(error)
