"""Processes that go through many images once and answer in order.

Like the loader's: each has a pipe of its own, and the end of either side is seen by the other at once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

from dino_exp.data.processes import ignore_signals, signals_held_back
from dino_exp.errors import DataError

Task = Callable[[range], tuple[Any, bytes]]
"""What is done to a range of numbers: a small answer, and bytes. It travels to processes, so it survives pickling."""

# The one server also starts the loader's workers later, which need more than these here.
_PRELOAD = ("dino_exp.data.loader", "dino_exp.data.files.cache_build")
_AHEAD = 2
_JOIN_SECS = 5.0


def answers(task: Task, ranges: Sequence[range], num_workers: int) -> Generator[tuple[Any, bytes], None, None]:
    """What `task` makes of each range, in order; by so many processes, or here where there are none.

    Raises what `task` raises: a DataError as it is, and anything else as one. Close the iterator to end the processes.
    """
    if not num_workers:
        yield from map(task, ranges)
        return
    members: list[_Member] = []
    try:
        with signals_held_back(_PRELOAD):
            # Not a list that is added: of those that were started before one that cannot be, none may be lost.
            members.extend(_started(task) for _ in range(min(num_workers, len(ranges))))
        for number in range(min(len(members) * _AHEAD, len(ranges))):
            members[number % len(members)].request(ranges[number])
        for number in range(len(ranges)):
            member = members[number % len(members)]
            yield member.receive()
            following = number + len(members) * _AHEAD
            if following < len(ranges):
                member.request(ranges[following])
    finally:
        for member in members:
            member.pipe.close()
        for member in members:
            member.end()


def _started(task: Task) -> _Member:
    try:
        return _Member(task)
    except OSError as problem:
        raise DataError(
            f"a process that decodes images cannot be started ({problem.strerror}); let fewer do it: runtime.workers=1"
        ) from problem


@dataclass
class _Member:
    """This side of one process."""

    task: Task

    def __post_init__(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        self.process: ForkServerProcess = context.Process(target=_serve, args=(self.task, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def request(self, numbers: range) -> None:
        with suppress(OSError):  # a dead process is told where its answer is missed
            self.pipe.send(numbers)

    def receive(self) -> tuple[Any, bytes]:
        try:
            answer, error = self.pipe.recv()
            if error is None:
                return answer, self.pipe.recv_bytes()
        except (EOFError, OSError) as problem:
            self.process.join(_JOIN_SECS)
            raise DataError(
                f"a process that decodes images ended with code {self.process.exitcode}; where memory is short, let "
                "fewer do it: runtime.workers=1. The same command begins that work again"
            ) from problem
        raise DataError(error)

    def end(self) -> None:
        self.process.join(_JOIN_SECS)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _serve(task: Task, pipe: Connection) -> None:
    ignore_signals()
    with suppress(EOFError, OSError):
        while True:
            numbers: range = pipe.recv()
            try:
                answer, data = task(numbers)
            except DataError as error:
                pipe.send((None, str(error)))
            except Exception as error:  # noqa: BLE001 - told over there
                pipe.send((None, f"images {numbers.start} to {numbers.stop - 1}: {type(error).__name__}: {error}"))
            else:
                pipe.send((answer, None))
                pipe.send_bytes(data)
