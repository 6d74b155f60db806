"""What the verbs of `dino-exp checkpoints` take: a run, one of its checkpoints, and the options that they share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from dino_exp.errors import UsageError
from dino_exp.runs.named import Named as Named
from dino_exp.runs.named import named as named

_RUN_HELP = "A run directory, the beginning of a run key, or `last`"
RunArgument = Annotated[str, typer.Argument(help=f"{_RUN_HELP}.")]
RunAtArgument = Annotated[
    str,
    typer.Argument(help=f"{_RUN_HELP}; `@latest`, `@best` or `@<step>` may follow. Or a manifest's path."),
]
CheckpointArgument = Annotated[
    str,
    typer.Argument(help=f"{_RUN_HELP}, with `@latest`, `@best` or `@<step>` behind it. Or a manifest's path."),
]
OutputsOption = Annotated[Path, typer.Option("--outputs", metavar="DIR", help="Where runs lie.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
OUTPUTS = Path("outputs")


def named_run(typed: str, outputs: Path, verb: str) -> Named:
    """The same for a verb that is about a whole run. Raises UsageError for one checkpoint of it."""
    found = named(typed, outputs)
    if found.at is not None:
        raise UsageError(
            f"{typed}: one checkpoint, expected a run: {verb} is about all of them. Try: "
            f"dino-exp checkpoints {verb} {shlex.quote(found.typed)}"
        )
    return found
