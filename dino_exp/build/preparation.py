"""How the data of a training, or of a look at one, is prepared. Light: most data needs none of what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dino_exp.data.files.listing import Progress, unheard

if TYPE_CHECKING:
    from dino_exp.dist.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How data is prepared: where caches lie (paths.cache), by how many processes at least, and who hears of it.

    `root_key` is the setting by which a user says where images lie now. Who `looks_only` makes do with what was
    prepared: no cache is made, and what is unreadable shows when it is read.
    """

    cache: Path
    workers: int = 0
    ranks: Ranks | None = None
    progress: Progress = unheard
    root_key: str = "data.root"
    looks_only: bool = False
