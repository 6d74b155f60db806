"""Work on parts of a batch at once, on the processor.

Torch divides one large operation among its threads; many small ones, one after the other, are faster when each
thread does all of them for a part of the batch: a part stays in the cache of its core, and nobody waits for anybody.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

Part = TypeVar("Part")
_TIMED = 3  # batches that are timed in each way, after one that is not: it fetches code and memory


def by_parts(device: torch.device) -> bool:
    """Whether a batch is best worked on part by part: on a processor; an accelerator wants all of it at once."""
    return device.type == "cpu"


def over_threads(work: Callable[[Part], None], parts: Iterable[Part]) -> None:
    """Call `work` with each part, in as many threads as torch has, each of which then has one to itself.

    Every other thread begins at the end. Sort parts by size: small operations, between which Python's lock is asked
    for all the time, then run beside large ones, during which it is free. What `work` raises is raised.
    """
    num_threads, remaining = torch.get_num_threads(), deque(parts)
    num_takers = min(num_threads, len(remaining))
    if num_takers < 2:
        for part in remaining:
            work(part)
        return

    def serve(take: Callable[[], Part]) -> None:
        try:
            for part in _until_empty(take):
                work(part)
        except BaseException:
            remaining.clear()
            raise

    own, *others = itertools.islice(itertools.cycle((remaining.popleft, remaining.pop)), num_takers)
    try:
        with ThreadPoolExecutor(len(others), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            helping = [pool.submit(serve, take) for take in others]
            torch.set_num_threads(1)
            serve(own)
            for helper in helping:
                helper.result()
    finally:
        torch.set_num_threads(num_threads)  # the number that threads begin with is one for all of the process


def in_one_thread(work: Callable[[Part], None], parts: Iterable[Part]) -> None:
    """Call `work` with each part, one after the other; torch uses no other thread meanwhile."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in parts:
            work(part)
    finally:
        torch.set_num_threads(num_threads)


class FasterWay:
    """Works on the parts of batches in all of torch's threads or in one, whichever is faster on this machine.

    Threads that ask for Python's lock between small operations hand it to each other all the time. What that costs
    differs more between processors than what a second core saves (docs/performance.md), so the first batches are
    worked on in each way in turn, and timed. Results have the same bits in both: a part has one thread in either.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._num_batches = 0
        self._secs_per_part: tuple[list[float], list[float]] = ([], [])
        self._in_one: bool | None = None

    def work(self, work: Callable[[Part], None], parts: Sequence[Part]) -> None:
        """Call `work` with each part. What it raises is raised, and such a batch is not counted."""
        if self._in_one is not None or min(torch.get_num_threads(), len(parts)) < 2:
            (in_one_thread if self._in_one else over_threads)(work, parts)
            return
        turn = self._num_batches % 2
        start = self._clock()
        (over_threads, in_one_thread)[turn](work, parts)
        self._note(turn, (self._clock() - start) / len(parts))

    def _note(self, turn: int, secs: float) -> None:
        self._num_batches += 1
        if self._num_batches > 2:
            self._secs_per_part[turn].append(secs)
        if self._num_batches == 2 * (1 + _TIMED):
            several, one = (1e3 * statistics.median(found) for found in self._secs_per_part)
            self._in_one = one < several
            log.debug("a part takes %.2f ms in one thread, %.2f in %d", one, several, torch.get_num_threads())


def _until_empty(take: Callable[[], Part]) -> Iterator[Part]:
    while True:
        try:
            part = take()
        except IndexError:
            return
        yield part
