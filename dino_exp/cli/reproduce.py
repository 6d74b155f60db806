"""`dino-exp runs reproduce`: train a part of a run again by its own code and settings, and compare bit for bit."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_exp.attempts.legs import Leg, legs_of
from dino_exp.attempts.reproduction import (
    Comparison,
    Span,
    choose_span,
    compare_replay,
    ended_by_signals,
    prepare_copy,
    refuse_empty,
    replay,
    set_settings,
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
from dino_exp.runs.signature import own_key
from dino_exp.words import count_text


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
      dino-exp runs reproduce /shared/runs/vit_s-1234 --verify 100 --trust --keep /tmp/again
    """
    paths = RunPaths(find_run(outputs, run).absolute())
    record = load_record(paths.run_json)
    if record is None:
        raise UsageError(f"{paths.run_json}: there is no run")
    load_stored(paths.directory)  # refuses settings that were edited
    span = choose_span(paths, record, at=at, num_steps=verify)
    refuse_empty(paths, record, span)
    legs = [
        (leg, recorded_code(paths.code_dir, leg.attempt.number, leg.attempt.code))
        for leg in legs_of(paths, record, span)
    ]
    changed = environment_differences(paths, environment_record(argv=sys.argv, environ=os.environ))
    _tell(record, legs, changed)
    if not trust:
        _refuse_strangers(paths, record, [code for _, code in legs])
    if keep is not None and keep.exists():
        raise UsageError(f"--keep {keep}: is there already, expected a new folder")
    with ended_by_signals():
        home = Path(tempfile.mkdtemp(prefix="reproduce-")) if keep is None else keep.absolute()
        try:
            found = _replay(paths, record, legs, home, keeps_copy=keep is not None)
        finally:
            if keep is None:
                shutil.rmtree(home, ignore_errors=True)
    if as_json:
        print_json({**_found_json(record, span, found), "environment": changed, "attempts": _legs_json(legs)})
    else:
        _tell_end(found, span, [leg for leg, _ in legs])
    if found.difference is not None:
        raise typer.Exit(1)


def _replay(
    paths: RunPaths, record: RunRecord, legs: Sequence[tuple[Leg, RecordedCode]], home: Path, *, keeps_copy: bool
) -> Comparison:
    home.mkdir(parents=True, exist_ok=True)
    span = Span(start=legs[0][0].span.start, stop=legs[-1][0].span.stop)
    copy = prepare_copy(paths, record, span, home / "outputs")
    # All of it before the first step: what cannot be had is told at once.
    places = {code.id: rebuild_code(code, home / _folder(number)) for number, (_, code) in _first_of_each(legs).items()}
    for leg, code in legs:
        set_settings(paths, copy, leg.changes)
        exit_code = replay(paths, copy, leg.span.stop, places[code.id], leg.num_ranks, keeps_copy=keeps_copy)
        if exit_code != 0:
            raise DinoExpError(f"the replay ended with exit code {exit_code} before step {leg.span.stop}; see above")
    found = compare_replay(paths, copy, span)
    if found.is_empty:  # the run has a checkpoint there, made at a step at which the replay had no reason to save
        raise DinoExpError(
            f"nothing was compared: no row of the run is of steps {span.start} to {span.stop}, and the replay made "
            "none of its checkpoints; try more steps: a greater --verify, or none"
        )
    return found


def _first_of_each(legs: Sequence[tuple[Leg, RecordedCode]]) -> dict[int, tuple[Leg, RecordedCode]]:
    """The legs that bring code that no earlier one had, by their place."""
    seen: dict[str, int] = {}
    for number, (_, code) in enumerate(legs):
        seen.setdefault(code.id, number)
    return {number: legs[number] for number in seen.values()}


def _folder(number: int) -> str:
    return "code" if number == 0 else f"code-{number + 1}"


def _refuse_strangers(paths: RunPaths, record: RunRecord, codes: Sequence[RecordedCode]) -> None:
    key = own_key(os.environ)
    if not all(code.is_signed(key, record.run_key) for code in codes):
        raise RefusedError(
            f"{paths.directory}: nothing shows that you made it (its code is not signed by your key), and its code is "
            "about to be run as you. Look at what is shown above, and add --trust if you do"
        )


def _found_json(record: RunRecord, span: Span, found: Comparison) -> dict[str, Any]:
    return {
        "run_key": record.run_key,
        "start": span.start,
        "stop": span.stop,
        "exact": found.difference is None,
        "rows": found.num_rows,
        "states": list(found.states),
        "difference": None if found.difference is None else spell(asdict(found.difference)),
    }


def _legs_json(legs: Sequence[tuple[Leg, RecordedCode]]) -> list[dict[str, Any]]:
    return [
        {
            "attempt": leg.attempt.number, "start": leg.span.start, "stop": leg.span.stop, "code_id": code.id,
            "git_commit": code.commit, "settings": spell(leg.changes), "world_size": leg.num_ranks,
        }
        for leg, code in legs
    ]  # fmt: skip


def _tell(record: RunRecord, legs: Sequence[tuple[Leg, RecordedCode]], changed: list[dict[str, Any]]) -> None:
    """On standard error: what is about to be run, and what is not as it was."""
    lines = []
    for leg, code in legs:
        lines.append(f"replaying steps {leg.span.start} to {leg.span.stop} of {record.run_key} by")
        told = [*code.describe(), ("attempt", str(leg.attempt.number))]
        told += [("with", leg.describe())] if leg.describe() else []
        lines += [f"  {name:<12}{value}" for name, value in told]
    lines += [f"  {'was':<12}{row['key']} {row['a']}, is {row['b']}" for row in changed]
    print(plain("\n".join(lines), keep="\n"), file=sys.stderr, flush=True)


def _tell_end(found: Comparison, span: Span, legs: Sequence[Leg]) -> None:
    states = f"the states of steps {', '.join(map(str, found.states))}" if found.states else "no state"
    what = f"{count_text(found.num_rows, 'row')} and {states}"
    if found.difference is None:
        print(f"exact: {what} of steps {span.start} to {span.stop} are the same, bit for bit")
        return
    one = found.difference
    print(f"not exact: the first difference is {plain(one.what)} at step {one.step} (compared: {what})")
    print_table(("", "value"), [("was", str(one.was)), ("now", str(one.now))])
    made_by = next(leg.attempt for leg in legs if one.step <= leg.span.stop)
    if made_by.why_not_exact:
        print(plain(f"attempt {made_by.number} said that it would not be exact: {'; '.join(made_by.why_not_exact)}"))
