"""`dino-exp runs doctor`: what is wrong with an outputs folder and the program around it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.text import Text

from dino_exp.catalogue.doctor import Finding, examine
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption
from dino_exp.cli.show import print_json, print_table
from dino_exp.errors import DinoExpError, RefusedError
from dino_exp.sweeps.record import FOLDER, load_sweep, sweep_names, sweep_path


def doctor(outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """Look for what is wrong: versions, git, disk, index, damaged or half-written runs, damaged sweeps.

    Exit 1 if there is a problem.

    Changes nothing; says the command that mends. Reading every byte is `dino-exp checkpoints verify --all`.

    \b
    Examples:
      dino-exp runs doctor
      dino-exp runs doctor --outputs /backup/outputs --json
    """
    found = [*examine(outputs), *_sweeps(outputs)]
    if as_json:
        print_json([vars(one) for one in found])
    else:
        styles = {"fine": "green", "note": "yellow", "problem": "red"}
        lines = [
            (Text(one.level, styles[one.level]), one.about, one.says.splitlines()[0], one.command or "")
            for one in found
        ]
        print_table(("", "what", "says", "to mend it"), lines)
    if any(one.level == "problem" for one in found):
        raise typer.Exit(1)


def _sweeps(outputs: Path) -> Iterator[Finding]:
    for name in sweep_names(outputs):
        path = sweep_path(outputs, name)
        try:
            load_sweep(path)
        except (DinoExpError, OSError) as problem:
            says = f"{problem}; without it the line that began the sweep plans it anew, and finds its runs"
            command = None if isinstance(problem, RefusedError) else f"rm {shlex.quote(str(path))}"
            yield Finding(level="problem", about=f"{FOLDER}/{name}", says=says, command=command)
