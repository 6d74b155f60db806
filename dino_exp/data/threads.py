"""Work on parts of a batch at once, on the processor.

Torch divides one large operation among its threads; many small ones, one after the other, are faster when each
thread does all of them for a part of the batch: a part stays in the cache of its core, and nobody waits for anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Part = TypeVar("Part")


def by_parts(device: torch.device) -> bool:
    """Whether a batch is best worked on part by part: on a processor; an accelerator wants all of it at once."""
    return device.type == "cpu"


def over_threads(work: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """Call `work` with each part, in as many threads as torch has, each of which then has one to itself.

    What `work` raises is raised. Python's lock is free while torch computes.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(parts) < 2:
        for part in parts:
            work(part)
        return
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, parts):
                pass
    finally:
        torch.set_num_threads(num_threads)  # the number that threads begin with is one for all of the process
