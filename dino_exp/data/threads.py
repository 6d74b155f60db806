"""Work on parts of a batch at once, on the processor.

Torch divides one large operation among its threads; many small ones, one after the other, are faster when each
thread does all of them for a part of the batch: a part stays in the cache of its core, and nobody waits for anybody.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")


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


def _until_empty(take: Callable[[], Part]) -> Iterator[Part]:
    while True:
        try:
            part = take()
        except IndexError:
            return
        yield part
