"""What people type where a run or one of its checkpoints is meant, as one thing."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from dino_exp.checkpoint.layout import parse_manifest_name
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.runs.find import find_run, split_at
from dino_exp.runs.layout import RunPaths


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
    if parse_manifest_name(path.name) is not None:
        usual = RunPaths(path).checkpoints.name
        folder = path.parent if path.parent.name == usual else path.parent.resolve()  # typed in it, or through a link
        if folder.name == usual:
            return Named(str(folder.parent), RunPaths(folder.parent), str(path))
    run_typed, at = split_at(typed)
    return Named(run_typed, RunPaths(find_run(outputs, run_typed)), at)
