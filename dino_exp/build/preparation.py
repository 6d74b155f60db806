"""How the data of a training, or of a look at one, is prepared. Light: most data needs none of what that takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dino_exp.data.files.listing import Progress, unheard

if TYPE_CHECKING:
    from dino_exp.dist.ranks import Ranks

T = TypeVar("T")
_STILL_SECS = 5.0  # after which the other ranks hear that the first one still works


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How data is prepared: where caches lie (paths.cache), by how many processes (0: all cores), and who hears of it.

    `root_key` is the setting by which a user says where images lie now. Who `looks_only` writes nothing: what was
    prepared is used as far as it is there, and nothing is fetched, checked or cached. `is_new` refuses images of
    another digest than the settings name: nothing else compares them before a run has its record.
    """

    cache: Path
    workers: int = 0
    ranks: Ranks | None = None
    progress: Progress = unheard
    root_key: str = "data.root"
    looks_only: bool = False
    is_new: bool = False


def in_turn(how: Preparation, work: Callable[[Progress], T]) -> T:
    """Rank 0 first: after it the others find everything done, unless they are on a host with another disk."""
    ranks = how.ranks
    if ranks is None or ranks.place.size == 1:
        return work(how.progress)
    if ranks.place.is_first:
        done = work(_keeping_others_waiting(ranks, how.progress))
        ranks.from_first(False)
        return done
    while ranks.from_first(True):
        pass
    return work(how.progress)


def _keeping_others_waiting(ranks: Ranks, progress: Progress) -> Progress:
    """Tell the other ranks now and then that there is more to do, or they would give rank 0 up for lost."""
    last = time.monotonic()

    def tell(word: str, done: int, total: int | None) -> None:
        nonlocal last
        progress(word, done, total)
        if time.monotonic() - last > _STILL_SECS:
            last = time.monotonic()
            ranks.from_first(True)

    return tell
