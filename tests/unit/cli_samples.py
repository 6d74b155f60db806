"""A run directory with toy checkpoints, and the command line in this process: milliseconds, and no training."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs_samples import CODE_HEX, CONFIG_HEX, sample_record
from support.checkpoints import save_steps

from dino_exp.checkpoint.policies import BestN, KeepAny, LatestN, Milestones, Pinned, milestone_from_text
from dino_exp.cli.app import run as run_command_line
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import save_record

KEEP = KeepAny((LatestN(9), Pinned(), BestN("knn_top1"), Milestones((milestone_from_text("25%"),))))


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it printed where."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.out.splitlines()]


def cli(*words: object, noun: str = "checkpoints") -> Result:
    """`dino-exp <noun> <words>` in this process. Any exception is a traceback, and passes."""
    argv, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["dino-exp", noun, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command_line()
    finally:
        sys.argv = argv
    return Result(code, out.getvalue(), err.getvalue())


def make_run(outputs: Path, *steps: int, variant: str | None = None, state: str = "stopped", **options: Any) -> Path:
    """A run below `outputs` with toy checkpoints of `steps` (see `support.checkpoints.ToyState`)."""
    key = f"vit_nano-{CONFIG_HEX[:8]}-{CODE_HEX[:8]}{f'-{variant}' if variant else ''}"
    paths = RunPaths(outputs / "runs" / key)
    paths.directory.mkdir(parents=True)
    save_record(paths.run_json, sample_record(run_key=key, variant=variant, state=state))
    if steps:
        save_steps(paths.checkpoints, steps, **{"keep": KEEP, **options})
    return paths.directory


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file below a folder, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in cli("list", run, "--json").json]
