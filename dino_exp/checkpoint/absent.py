"""What is told where a checkpoint is asked for and is not there: what there is instead, and how to see it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from dino_exp.errors import NoCheckpointError, NothingSavedError

_MOST_LISTED = 20


def no_checkpoint(folder: Path, asked: str, steps: Sequence[int]) -> NoCheckpointError:
    """The error for a folder of checkpoints that has those of `steps`, and none that is as `asked`."""
    if not steps:
        return NothingSavedError(folder.parent)
    return NoCheckpointError(f"{folder}: no checkpoint {asked}; steps here: {listed(steps)}. {to_see(folder)}")


def to_see(folder: Path) -> str:
    """The command that lists the checkpoints of a folder."""
    return f"To see them: dino-exp checkpoints list {shlex.quote(str(folder.parent))}"


def listed(steps: Sequence[int]) -> str:
    """Ascending steps, the newest of very many."""
    newest = ", ".join(map(str, steps[-_MOST_LISTED:]))
    return newest if len(steps) <= _MOST_LISTED else f"{newest} and {len(steps) - _MOST_LISTED} older"
