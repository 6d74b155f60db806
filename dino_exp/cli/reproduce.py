"""`dino-exp runs reproduce`: train a part of a run again by its own code and settings, and compare bit for bit."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_exp.attempts.reproduction import (
    Comparison,
    Span,
    choose_span,
    compare_replay,
    prepare_copy,
    ranks_of,
    replay,
)
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument
from dino_exp.cli.run_diff import environment_differences
from dino_exp.cli.show import plain, print_json, print_table
from dino_exp.config.stored import load_stored
from dino_exp.errors import DinoExpError, RefusedError, UsageError
from dino_exp.runs.code_rebuild import RecordedCode, rebuild_code, recorded_code
from dino_exp.runs.environment import environment_record
from dino_exp.runs.find import find_run
from dino_exp.runs.jsontext import spell
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record


def reproduce(
    run: RunArgument,
    verify: Annotated[
        int | None, typer.Option("--verify", metavar="N", min=1, help="Only N steps; by default all that the run made.")
    ] = None,
    at: Annotated[
        int | None, typer.Option("--at", metavar="STEP", min=0, help="Begin at the checkpoint of this step.")
    ] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code of a run that you did not make on this machine.")
    ] = False,
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Where code and replay stay; else they are removed.")
    ] = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Train a run again from its recorded commit, patch, settings and state, and say whether each bit is the same.

    It runs recorded code: what it is going to run is shown first. Exit 0 if exact, 1 if not.

    \b
    Examples:
      dino-exp runs reproduce last --verify 20
      dino-exp runs reproduce vit_nano-67b8 --at 770 --verify 50
      dino-exp runs reproduce /shared/runs/vit_s-1234 --verify 5 --trust --keep /tmp/again
    """
    paths = RunPaths(find_run(outputs, run).absolute())
    record = load_record(paths.run_json)
    if record is None:
        raise UsageError(f"{paths.run_json}: there is no run")
    load_stored(paths.directory)  # refuses settings that were edited
    span, code = choose_span(paths, record, at=at, num_steps=verify), recorded_code(paths.code_dir)
    changed = environment_differences(paths, environment_record(argv=sys.argv, environ=os.environ))
    _tell(record, code, span, changed)
    if not (trust or _is_ours(paths, record)):
        raise RefusedError(
            f"{paths.directory}: was not made by you on this machine, and its code is about to be run as you. Look at "
            "what is shown above, and add --trust if you do"
        )
    if keep is not None and keep.exists():
        raise UsageError(f"--keep {keep}: is there already, expected a new folder")
    home = Path(tempfile.mkdtemp(prefix="reproduce-")) if keep is None else keep.absolute()
    try:
        found = _replay(paths, record, code, span, home)
    finally:
        if keep is None:
            shutil.rmtree(home, ignore_errors=True)
    exact = found.difference is None
    if as_json:
        print_json(
            {
                "run_key": record.run_key,
                "start": span.start,
                "stop": span.stop,
                "exact": exact,
                "rows": found.num_rows,
                "states": list(found.states),
                "difference": None if found.difference is None else spell(asdict(found.difference)),
                "environment": changed,
            }
        )
    else:
        _tell_end(found, span)
    if not exact:
        raise typer.Exit(1)


def _replay(paths: RunPaths, record: RunRecord, code: RecordedCode, span: Span, home: Path) -> Comparison:
    home.mkdir(parents=True, exist_ok=True)
    copy = prepare_copy(paths, record, span, home / "outputs")
    place = rebuild_code(code, home / "code")
    exit_code = replay(paths, copy, span, place, ranks_of(record))
    if exit_code != 0:
        raise DinoExpError(f"the replay ended with exit code {exit_code} before step {span.stop}; see above")
    return compare_replay(paths, copy, span)


def _is_ours(paths: RunPaths, record: RunRecord) -> bool:
    """Whether this user made the run on this machine: then its code is no stranger's."""
    hosts = {one.host for one in record.attempts}
    return hosts == {socket.gethostname()} and paths.run_json.stat().st_uid == os.getuid()


def _tell(record: RunRecord, code: RecordedCode, span: Span, changed: list[dict[str, Any]]) -> None:
    """On standard error: what is about to be run, and what is not as it was."""
    lines = [f"replaying steps {span.start} to {span.stop} of {record.run_key} by"]
    lines += [f"  {name:<12}{value}" for name, value in code.describe()]
    lines += [f"  {'was':<12}{row['key']} {row['a']}, is {row['b']}" for row in changed]
    print(plain("\n".join(lines), keep="\n"), file=sys.stderr, flush=True)


def _tell_end(found: Comparison, span: Span) -> None:
    states = f"the states of steps {', '.join(map(str, found.states))}" if found.states else "no state"
    what = f"{found.num_rows} rows and {states}"
    if found.difference is None:
        print(f"exact: {what} of steps {span.start} to {span.stop} are the same, bit for bit")
        return
    one = found.difference
    print(f"not exact: the first difference is {plain(one.what)} at step {one.step} (compared: {what})")
    print_table(("", "value"), [("was", str(one.was)), ("now", str(one.now))])
