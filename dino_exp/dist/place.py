"""Which of how many processes this one is, as its launcher says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dino_exp.errors import ConfigError, UsageError


@dataclass(frozen=True, kw_only=True)
class Place:
    """The rank of a process among `size` of them, and among those of its host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size):
            raise ConfigError(
                f"rank {self.rank} of {self.size} processes, {self.local_rank} of {self.local_size} on this host: "
                "expected ranks from 0 to below their number; start the processes with torchrun"
            )

    @property
    def is_first(self) -> bool:
        """Whether this is the process that decides, writes records and prints."""
        return self.rank == 0

    def share_of(self, num: int) -> range:
        """Which of `num` things, in order, are this process's: the shares of all differ by at most one."""
        return share(num, self.rank, self.size)

    def refuse_sweep(self) -> None:
        """Raises UsageError where several processes would each run the same `--multirun`."""
        if self.size > 1:
            raise UsageError(
                f"--multirun in rank {self.rank} of {self.size}: every rank would run the whole sweep. Start the sweep "
                "without torchrun, or each of its jobs with one"
            )


ALONE = Place()


def share(num: int, part: int, num_parts: int) -> range:
    """The `part`-th of so many consecutive parts of range(num), which differ by at most one in length."""
    return range(part * num // num_parts, (part + 1) * num // num_parts)


def place_of(environ: Mapping[str, str]) -> Place:
    """What torchrun (or another launcher that sets its variables) says; a process started by hand is alone.

    Raises ConfigError for what cannot be.
    """
    if not environ.get("RANK") or not environ.get("WORLD_SIZE"):
        return ALONE
    return Place(
        rank=_whole(environ, "RANK", 0),
        size=_whole(environ, "WORLD_SIZE", 1),
        local_rank=_whole(environ, "LOCAL_RANK", 0),
        local_size=_whole(environ, "LOCAL_WORLD_SIZE", _whole(environ, "LOCAL_RANK", 0) + 1),
    )


def _whole(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} in the environment, expected a whole number; start the processes with torchrun")
    return int(text)
