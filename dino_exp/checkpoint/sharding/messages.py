"""What the process that leads a save tells the others, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from dino_exp.checkpoint.base import UnusableBaseError
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.writing import NonFiniteStateError
from dino_exp.dist.council import LostRankError, OtherRankError
from dino_exp.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DinoExpError,
    LockedError,
    NoCheckpointError,
    SaveFailedError,
)


@dataclass(frozen=True, kw_only=True)
class WriteOrder:
    """Write your share of the state that you have copied, so encoded, against this checkpoint."""

    storage: Storage
    base: Manifest | None


@dataclass(frozen=True, kw_only=True)
class CheckOrder:
    """Read back what you wrote of this checkpoint, which is committed."""

    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class LoadOrder:
    """Load this checkpoint, which is good, from this folder."""

    manifest: Manifest
    folder: str


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was committed: its step, and why it was saved."""

    step: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class End:
    """That was all. `latest_step`: of what is on disk."""

    trouble: Trouble | None
    committed: Commit | None = None
    latest_step: int | None = None
    restored: Any = None


@dataclass(frozen=True)
class Trouble:
    """An error that can travel between processes: its kind, and what makes one of that kind again."""

    kind: str
    arguments: tuple[Any, ...]

    def error(self, rank: int | None) -> Exception:
        """The error, with the rank that had it."""
        return _MAKERS[self.kind]("" if rank is None else f"rank {rank}: ", self.arguments)


def trouble_of(error: BaseException) -> Trouble:
    """How to tell others of an error."""
    match error:
        case UnusableBaseError():
            return Trouble("base", (error.step, error.reason, error.is_damage))
        case NonFiniteStateError():
            return Trouble("non-finite", (error.name,))
        case SaveFailedError():
            return Trouble("unsaved", (error.step, error.problem))
        case OSError():
            name = None if error.filename is None else str(error.filename)
            return Trouble("disk", (error.errno or 0, error.strerror or str(error), name))
        case DinoExpError() if type(error).__name__ in _MAKERS:
            return Trouble(type(error).__name__, (str(error),))
        case DinoExpError():
            return Trouble("other", (str(error), error.exit_code))
    return Trouble("other", (f"{type(error).__name__}: {error}", 1))


def _disk(prefix: str, arguments: tuple[Any, ...]) -> OSError:
    number, text, name = arguments
    return OSError(number, prefix + text, *([] if name is None else [name]))


_Maker: TypeAlias = Callable[[str, tuple[Any, ...]], Exception]
_MAKERS: dict[str, _Maker] = {
    "base": lambda _, given: UnusableBaseError(given[0], given[1], is_damage=given[2]),
    "non-finite": lambda _, given: NonFiniteStateError(given[0]),
    "unsaved": lambda _, given: SaveFailedError(given[0], given[1]),
    "disk": _disk,
    "other": lambda prefix, given: OtherRankError(prefix + given[0], given[1]),
    **{
        kind.__name__: lambda prefix, given, kind=kind: kind(prefix + given[0])  # type: ignore[misc]
        for kind in (CheckpointError, CorruptCheckpointError, NoCheckpointError, LostRankError, LockedError)
    },
}
