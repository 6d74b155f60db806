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
    """Rank 0 first: after it the others find everything done. On a host with another disk they do it again there, side
    by side, while all wait for them: a collective of training would give them up for lost.
    """
    if how.ranks is None:
        return work(how.progress)
    started = time.monotonic()

    def waiting() -> None:
        how.progress("waiting for other processes that prepare the data", int(time.monotonic() - started), None)

    def with_signs(sign: Callable[[], None]) -> T:
        def tell(word: str, done: int, total: int | None) -> None:
            how.progress(word, done, total)
            sign()

        return work(tell)

    return how.ranks.in_turn(with_signs, waiting)
