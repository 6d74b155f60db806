"""`dino-exp sweeps list|show|resume|report`: look after sweeps."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_exp.analysis.style import check_suffix
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption
from dino_exp.cli.report import ToOption, check_target, write_document
from dino_exp.cli.show import plain, print_json, print_table
from dino_exp.config.typed import override, train_command
from dino_exp.errors import STOPPING, DinoExpError, UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.processes import run_child
from dino_exp.runs.jsontext import spell
from dino_exp.sweeps.outcome import OUTCOME_COLUMNS, Outcome, outcome_lines, outcomes_of
from dino_exp.sweeps.record import PAGE, SweepRecord, load_sweep, sweep_names, sweep_path
from dino_exp.sweeps.report import report_lines, usual_metric
from dino_exp.words import age_text, count_text

SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="A sweep's name, its beginning, or `last`.")]


def list_all(outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """List sweeps, the one that was started last first, with what became of their jobs.

    \b
    Examples:
      dino-exp sweeps list
      dino-exp sweeps list --json
    """
    found = _readable(outputs)
    found.sort(key=lambda sweep: sweep.created_at, reverse=True)
    rows = [_summary(sweep, outcomes_of(sweep, outputs)) for sweep in found]
    if as_json:
        print_json(rows)
    if not rows and sweep_names(outputs):  # there are some, and none can be read
        raise typer.Exit(DamagedFileError.exit_code)
    if as_json:
        return
    if not rows:
        print(f"no sweep below {outputs}; `python -m dino_exp.train --multirun seed=0,1` makes one")
        return
    now_secs = time.time()
    lines = [
        (row["name"], str(row["num_jobs"]), _states_text(row["states"]), age_text(row["created_at"], now_secs))
        for row in rows
    ]
    print_table(("sweep", "jobs", "states", "started"), lines, right=("jobs", "started"))


def show(sweep: SweepArgument, outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """Show the jobs of a sweep: run, state, best value, the first line of an error.

    \b
    Examples:
      dino-exp sweeps show last
      dino-exp sweeps show s-58af --json
    """
    record = _find(outputs, sweep)
    outcomes = outcomes_of(record, outputs)
    if as_json:
        print_json({**_summary(record, outcomes), "typed": list(record.typed), "jobs": list(map(_job, outcomes))})
        return
    print_table(OUTCOME_COLUMNS, outcome_lines(outcomes), right=("job",))
    print(f"{plain(record.name)}: {count_text(len(outcomes), 'job')}, {_states_text(_states(outcomes))}")
    for number, one in enumerate(outcomes):
        if one.has_failed:
            where = "" if one.traceback is None else f" (traceback in {plain(str(one.traceback))})"
            print(f"job {number} again: {plain(one.command)}{where}")


def resume(
    sweep: SweepArgument,
    failed: Annotated[bool, typer.Option("--failed", help="Only the jobs that failed, one after the other.")] = False,
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """Go on with a sweep by the line that began it: finished jobs are skipped, others continued or tried again.

    \b
    Examples:
      dino-exp sweeps resume last
      dino-exp sweeps resume s-58af --failed
    """
    record = _find(outputs, sweep)
    if not failed:
        raise typer.Exit(_train(*record.words([*_here(record.typed, outputs), f"sweep.name={record.name}"])))
    chosen = [one for one in outcomes_of(record, outputs) if one.has_failed]
    if not chosen:
        print(f"no job of {plain(record.name)} has failed")
        return
    num_well, stopped = 0, 0
    for one in chosen:
        code = _train(*record.options, *_here(one.job.overrides, outputs))
        num_well += code == 0
        if code in STOPPING:
            stopped = code
            break
    print(f"{num_well} of {count_text(len(chosen), 'job')} that had failed ended well")
    raise typer.Exit(stopped or int(num_well < len(chosen)))


def report(
    sweep: SweepArgument,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What the jobs are compared by; else what they are judged by.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw one or two swept settings: .png, .svg, .pdf.")
    ] = None,
    to: ToOption = None,
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """Print a Markdown table of the jobs, the best first, and write a page about the sweep.

    The page is report.html beside the sweep's record unless --to says
    otherwise: a table that sorts, the metric against each swept setting,
    groups over seeds with their spread, and what failed.

    \b
    Examples:
      dino-exp sweeps report last
      dino-exp sweeps report last --metric knn_1shot > table.md
      dino-exp sweeps report last --to sweep.md --picture sweep.png
    """
    record = _find(outputs, sweep)
    target = sweep_path(outputs, record.name).with_name(PAGE) if to is None else to
    check_target(target)
    if picture is not None:
        check_suffix(picture, "--picture")
    outcomes = outcomes_of(record, outputs)
    metric = usual_metric(outcomes) if metric is None else metric
    for line in report_lines(record, outcomes, metric):
        print(plain(line))
    if picture is not None:
        from dino_exp.sweeps.picture import draw_sweep

        draw_sweep(outcomes, metric).save(picture)
    from dino_exp.sweeps.page import sweep_document

    write_document(sweep_document(record, outcomes, metric, outputs=outputs, now_secs=time.time()), target)
    print(f"page: {plain(str(target))}", file=sys.stderr)


def _find(outputs: Path, named: str) -> SweepRecord:
    names = sweep_names(outputs)
    if named == "last" and (found := _readable(outputs)):
        return max(found, key=lambda sweep: sweep.updated_at)
    matches = [name for name in names if name == named] or [name for name in names if name.startswith(named)]
    if len(matches) != 1:
        which = ", ".join(matches[:8] or names[:8]) or "none"
        raise UsageError(f"{named!r} begins the names of {count_text(len(matches), 'sweep')}; there are: {which}")
    return _load(outputs, matches[0])


def _readable(outputs: Path) -> list[SweepRecord]:
    """All sweeps whose record can be read; the others are told, and hide none of them."""
    found = []
    for name in sweep_names(outputs):
        try:
            found.append(_load(outputs, name))
        except DinoExpError as problem:
            print(f"dino-exp: {plain(str(problem))}", file=sys.stderr)
    return found


def _load(outputs: Path, name: str) -> SweepRecord:
    record = load_sweep(sweep_path(outputs, name))
    if record is None:
        raise UsageError(f"{sweep_path(outputs, name)}: it is gone")
    return record


def _summary(record: SweepRecord, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "name": record.name,
        "num_jobs": len(outcomes),
        "states": dict(_states(outcomes)),
        "launcher": record.launcher,
        "created_at": record.created_at,
        "updated_at": record.updated_at,
    }


def _states(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(one.shown_state for one in outcomes)


def _states_text(states: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{num} {state}" for state, num in sorted(states.items()))


def _job(one: Outcome) -> dict[str, Any]:
    best = None if one.record is None or one.record.best is None else spell(vars(one.record.best))
    return {
        "overrides": list(one.job.overrides),
        "run_key": one.run_key,
        "state": one.state,
        "best": best,
        "metrics": {} if one.record is None else spell(one.record.metrics),
        "error": one.error or None,
        "command": one.command,
    }


def _here(words: Sequence[str], outputs: Path) -> list[str]:
    """The overrides for where the runs lie now: the folder may have been moved, or named from elsewhere."""
    kept = [word for word in words if not word.startswith(("sweep.name=", "sweep.dry_run=", "paths.outputs="))]
    return [*kept, override("paths.outputs", outputs)]


def _train(*words: str) -> int:
    """`python -m dino_exp.train`, which is told on standard error, and hears what this process is told; its code."""
    print(f"$ {plain(train_command(*words))}", file=sys.stderr, flush=True)
    return run_child([sys.executable, "-m", "dino_exp.train", *words]).code
