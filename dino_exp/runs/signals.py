"""Signals ask; the training loop answers at a safe place.

TERM, INT and USR2: save and stop. USR1: save and go on. A second INT aborts at once.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, TypeAlias

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | None
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
SAVE_SIGNAL = signal.SIGUSR1


class SecondInterruptError(KeyboardInterrupt):
    """The user does not want to wait for the save that a first interrupt asked for."""


class SignalFlags:
    """Handlers that only set flags, installed inside `with`. Outside the main thread none can be: logged."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None
        self._save_wanted = False
        self._num_interrupts = 0
        self._previous: dict[int, Handler] = {}

    def __enter__(self) -> SignalFlags:
        if threading.current_thread() is not threading.main_thread():
            log.warning("signals are not handled: training runs outside the main thread")
            return self
        for number in (*STOP_SIGNALS, SAVE_SIGNAL):
            self._previous[number] = signal.getsignal(number)
            signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and that Python cannot put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    @property
    def exit_code(self) -> int:
        """128 + N after stop signal N, 0 without one."""
        return 128 + self.stop_signal if self.stop_signal else 0

    def take_save_request(self) -> bool:
        """Whether USR1 came since the last call."""
        wanted, self._save_wanted = self._save_wanted, False
        return wanted

    def agree(self, of_first: Sequence[float] = ()) -> Sequence[float]:
        """One process has nothing to agree on: its own readings."""
        return of_first

    def call_previous(self, number: int, frame: FrameType | None = None) -> bool:
        """After the save: call the handler that a launcher had installed (submitit's USR2 requeues the job).

        Answers whether there was one. Python's own handler of INT is none: it only raises KeyboardInterrupt.
        """
        handler = self._previous.get(number)
        if not callable(handler) or handler is signal.default_int_handler:
            return False
        handler(number, frame)
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self._save_wanted = True
            return
        if self.stop_signal is None:
            self.stop_signal = number
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                raise SecondInterruptError
