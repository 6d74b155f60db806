"""`dino-exp checkpoints pin|unpin`: keep a checkpoint whatever the policy says, also while the run is being trained."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer

from dino_exp.checkpoint import pins
from dino_exp.cli.arguments import OUTPUTS, CheckpointArgument, Named, OutputsOption, named
from dino_exp.cli.owning import own
from dino_exp.cli.show import plain
from dino_exp.errors import DinoExpError, UsageError
from dino_exp.runs.events import EventLog
from dino_exp.runs.layout import RunPaths


def pin(
    checkpoint: CheckpointArgument,
    note: Annotated[
        str | None, typer.Option("--note", metavar="TEXT", help="Why it is kept, for whoever finds it pinned.")
    ] = None,
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """Keep a checkpoint whatever the policy says.

    Works while the run is being trained: the training honours it whenever it
    drops something. A second pin changes the note. Exit 4 if the checkpoint
    is not there, or was dropped in this very moment.

    \b
    Examples:
      dino-exp checkpoints pin last@best --note "for the paper"
      dino-exp checkpoints pin vit_nano-67b8@120
    """
    wanted = named(checkpoint, outputs)
    step = wanted.reader.resolve(_at(wanted, "pin"))
    with contextlib.suppress(FileNotFoundError):  # dropped just now, which `pins.pin` tells better
        wanted.reader.manifest(step)  # what cannot be read is not worth a pin, and raises
    before = pins.pin(wanted.paths.checkpoints, step, note)
    if before is None or note not in (None, before):
        _record(wanted.paths, "pinned", step=step, note=note or "")
    print(plain(_told(f"step {step} of {wanted.paths.directory}", before, note)))


def unpin(checkpoint: CheckpointArgument, outputs: OutputsOption = OUTPUTS) -> None:
    """Let the policy decide again about a pinned checkpoint. Nothing is dropped now.

    \b
    Examples:
      dino-exp checkpoints unpin last@120
    """
    wanted = named(checkpoint, outputs)
    at = _at(wanted, "unpin")
    step = int(at) if at.isdecimal() else wanted.reader.resolve(at)  # a pin may outlive its checkpoint
    note = pins.unpin(wanted.paths.checkpoints, step)
    _record(wanted.paths, "unpinned", step=step, note=note)
    print(
        plain(
            f"unpinned step {step} of {wanted.paths.directory}{_noted(note)}; the policy decides about it from now on"
        )
    )


def _at(wanted: Named, verb: str) -> str:
    if wanted.at is None:
        raise UsageError(
            f"{wanted.paths.directory}: which checkpoint? Expected a step, best or latest, such as: "
            f"dino-exp checkpoints {verb} {wanted.quoted}@best"
        )
    return wanted.at


def _told(which: str, before: str | None, note: str | None) -> str:
    if before is None:
        return f"pinned {which}{_noted(note or '') or ' (no note; --note TEXT adds one)'}"
    if note in (None, before):
        return f"{which} is pinned already{_noted(before)}"
    return f"{which} was pinned already{_noted(before)}; the note is now: {note}"


def _noted(note: str) -> str:
    return f": {note}" if note else ""


def _record(paths: RunPaths, kind: str, *, step: int, note: str) -> None:
    """A row in events.jsonl, if nobody works on the run: the file has one writer, who knows where its lines end.

    A training that is under way tells of the pin itself, by the reasons of what it keeps and drops.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(DinoExpError, OSError))  # the pin is made; a row is worth no failure
        stack.enter_context(own(paths, "no event was written"))
        stack.enter_context(contextlib.closing(EventLog(paths.events, time.time))).append(kind, step=step, note=note)
