"""What the verbs of `dino-exp checkpoints` take: a run, one of its checkpoints, and the options that they share."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dino_exp.checkpoint.layout import parse_manifest_name
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import UsageError
from dino_exp.runs.find import find_run, split_at
from dino_exp.runs.layout import RunPaths

_RUN_HELP = "A run directory, the beginning of a run key, or `last`"
RunArgument = Annotated[str, typer.Argument(help=f"{_RUN_HELP}.")]
RunAtArgument = Annotated[
    str,
    typer.Argument(help=f"{_RUN_HELP}; `@latest`, `@best` or `@<step>` may follow. Or a manifest's path."),
]
OutputsOption = Annotated[Path, typer.Option("--outputs", metavar="DIR", help="Where runs lie.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Named:
    """A run that somebody typed, and which of its checkpoints: "latest", "best", a step or a path; None: not said."""

    typed: str
    paths: RunPaths
    at: str | None

    @property
    def quoted(self) -> str:
        """Its directory, for a command that can be typed as it stands."""
        return shlex.quote(str(self.paths.directory))

    @property
    def reader(self) -> CheckpointReader:
        """Its checkpoints, to look at."""
        return CheckpointReader(self.paths.checkpoints)


def named(typed: str, outputs: Path) -> Named:
    """Find what was typed. Raises UsageError with what there is instead."""
    path = Path(typed)
    if parse_manifest_name(path.name) is not None and path.parent.name == RunPaths(path).checkpoints.name:
        run = path.parent.parent
        return Named(str(run), RunPaths(run), str(path))
    run_typed, at = split_at(typed)
    return Named(run_typed, RunPaths(find_run(outputs, run_typed)), at)


def named_run(typed: str, outputs: Path, verb: str) -> Named:
    """The same for a verb that is about a whole run. Raises UsageError for one checkpoint of it."""
    found = named(typed, outputs)
    if found.at is not None:
        raise UsageError(
            f"{typed}: one checkpoint, expected a run: {verb} is about all of them. Try: "
            f"dino-exp checkpoints {verb} {found.typed}"
        )
    return found
