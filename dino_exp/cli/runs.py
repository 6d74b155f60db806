"""`dino-exp runs list|best|...`: across the runs below an outputs folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.catalogue.database import View
from dino_exp.catalogue.query import (
    Filter,
    best_groups,
    best_runs,
    check_columns,
    count_runs,
    list_runs,
    natural_mode,
    problems,
)
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption
from dino_exp.cli.show import plain, print_json, print_table
from dino_exp.errors import UsageError
from dino_exp.runs.record import STATES
from dino_exp.words import age_text, count_text, with_short_digests

PUBLIC = (
    "run_key", "path", "state", "config_hash", "group_hash", "code", "data_fingerprint", "parent", "attempts", "step",
    "epochs_done", "metrics", "best",
)  # fmt: skip
_COLUMNS = ("run_key", "state", "step", "epochs_done", "best", "started")
_SHOWN_ONLY = ("started", "commit")
_SHOWN = 50
_MAX_PROCESSES = 4  # to read runs; more than these, the one that writes the catalogue cannot follow
_MODES = ("max", "min")
_HASH = re.compile(r"[0-9a-f]{1,64}")

WhereOption = Annotated[
    list[str], typer.Option("--where", metavar="KEY=VALUE", help="Only runs of this setting; may be repeated.")
]
StateOption = Annotated[
    list[str],
    typer.Option("--state", metavar=f"<{'|'.join(STATES)}>", help="Only runs in this state; may be repeated."),
]
TagOption = Annotated[list[str], typer.Option("--tag", help="Only runs with this tag; may be repeated.")]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=0, help=f"At most so many; 0: all. Tables show {_SHOWN}, JSON all.")
]


def list_all(
    where: WhereOption = [],  # noqa: B006  # typer wants a list, and makes a new one each time
    state: StateOption = [],  # noqa: B006
    tag: TagOption = [],  # noqa: B006
    sort: Annotated[
        str, typer.Option("--sort", help="started, step, key, or a metric; the newest or highest first.")
    ] = "started",
    columns: Annotated[
        str | None, typer.Option("--columns", help="Fields, metrics and settings, with commas between.")
    ] = None,
    limit: LimitOption = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """List runs, the one that was started last first.

    \b
    Examples:
      dino-exp runs list
      dino-exp runs list --where model=vit_s --where optimizer.lr=1e-3 --state failed --state interrupted
      dino-exp runs list --sort knn_top1 --columns run_key,knn_top1,optimizer.lr,seed
      dino-exp runs list --json --limit 10
    """
    chosen = Filter.parse(where, state, tag)
    names = _COLUMNS if columns is None else tuple(filter(None, map(str.strip, columns.split(","))))
    if not names:
        raise UsageError(f"--columns {columns!r}: expected names with commas between, such as {','.join(_COLUMNS)}")
    with _view(outputs) as view:
        check_columns(view, names, (*PUBLIC, *_SHOWN_ONLY))
        rows = list_runs(view, chosen, sort=sort, limit=_limit(limit, as_json))
        total, unread = count_runs(view, chosen), problems(view)
    if as_json:
        print_rows([_public(row, outputs) for row in rows])
    else:
        if rows:
            now_secs = time.time()
            lines = [tuple(_cell(row, name, now_secs) for name in names) for row in rows]
            print_table(names, lines, right=[name for name in names if name not in ("run_key", "state", "best")])
        elif not total:
            print(_no_run(outputs, chosen))
        if len(rows) < total:
            print(f"{len(rows)} of {count_text(total, 'run')}; all: --limit 0")
    _tell_unread(unread)


def best(
    metric: Annotated[str, typer.Option("--metric", help="What is compared.")] = "knn_top1",
    mode: Annotated[
        str | None,
        typer.Option("--mode", metavar=f"<{'|'.join(_MODES)}>", help="By default min for losses, else max."),
    ] = None,
    group: Annotated[bool, typer.Option("--group", help="Average over seeds: mean, spread, number of runs.")] = False,
    commit: Annotated[
        str | None,
        typer.Option("--commit", help="Only checkpoints written by this commit: its beginning, a tag, a branch, HEAD."),
    ] = None,
    where: WhereOption = [],  # noqa: B006
    state: StateOption = [],  # noqa: B006
    tag: TagOption = [],  # noqa: B006
    limit: LimitOption = None,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Which run, commit and settings gave the best checkpoint. Only checkpoints that are there, healthy and finite.

    \b
    Examples:
      dino-exp runs best
      dino-exp runs best --metric knn_1shot --group
      dino-exp runs best --metric val_loss --where model=vit_nano --commit 8d9ec40
    """
    direction = _direction(metric, mode)
    chosen = Filter.parse(where, state, tag)
    question = best_groups if group else best_runs
    digits = None if commit is None else _commit_digits(commit)
    with _view(outputs) as view:
        rows = question(view, chosen, metric=metric, mode=direction, commit=digits, limit=_limit(limit, as_json))
        total, unread = count_runs(view, chosen), problems(view)
    if as_json:
        print_rows(rows if group else [_public(row, outputs) for row in rows])
    elif not total:
        print(_no_run(outputs, chosen))
    elif not rows:
        by = "" if digits is None else f" that commit {digits[:12]} has written"
        look = f"dino-exp runs list --outputs {shlex.quote(str(outputs))}"
        print(plain(f"no checkpoint of these{by} has {metric}, below {outputs}; how far the runs are: {look}"))
    elif group:
        _print_groups(rows, metric)
    else:
        _print_best(rows, metric, outputs)
    _tell_unread(unread)


def rebuild(outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """Write the catalogue anew from the runs. Needed only to make the other commands fast again.

    \b
    Examples:
      dino-exp runs rebuild
      dino-exp runs rebuild --outputs /backup/outputs
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not outputs.is_dir():
        raise UsageError(f"{outputs}: no such folder; `python -m dino_exp.train` makes it")
    catalogue = Catalogue(outputs, _say)
    columns = (TextColumn("reading runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as progress:
        task = progress.add_task("", total=None)
        rebuilt = catalogue.rebuild(
            lambda done, total: progress.update(task, completed=done, total=total),
            num_processes=min(os.cpu_count() or 1, _MAX_PROCESSES),
        )
    num_runs, num_checkpoints, unread = rebuilt.num_runs, rebuilt.num_checkpoints, rebuilt.unread
    if as_json:
        print_json({"runs": num_runs, "checkpoints": num_checkpoints, "unreadable": unread})
        return
    print(f"{catalogue.path}: {count_text(num_runs, 'run')}, {count_text(num_checkpoints, 'checkpoint')}")
    _tell_unread(unread)


@contextlib.contextmanager
def _view(outputs: Path) -> Iterator[View]:
    with contextlib.closing(Catalogue(outputs, _say).view()) as view:
        yield view


def _say(text: str) -> None:
    print(plain(text), file=sys.stderr)


def _no_run(outputs: Path, chosen: Filter) -> str:
    """That there is none, and what makes one or finds one."""
    if chosen != Filter():
        return plain(f"no run of these below {outputs}")
    return plain(f"no run below {outputs}; `python -m dino_exp.train` makes one, `--outputs DIR` looks elsewhere")


def _limit(asked: int | None, as_json: bool) -> int | None:
    if asked is None:
        return None if as_json else _SHOWN
    return asked or None


def _commit_digits(commit: str) -> str:
    """The beginning of a commit's hash, as typed, or of the revision of this package's repository that was typed."""
    if _HASH.fullmatch(commit.lower()):
        return commit.lower()
    from dino_exp.runs.code_identity import PACKAGE_DIR, ask_git

    found = ask_git(PACKAGE_DIR, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if found is None:
        raise UsageError(
            f"--commit {commit}: expected the first digits of a commit's hash, or a revision that the repository of "
            f"{PACKAGE_DIR} knows"
        )
    return found


def _direction(metric: str, mode: str | None) -> Literal["max", "min"]:
    if mode is not None and mode not in _MODES:
        raise UsageError(f"--mode {mode}: expected max or min")
    return natural_mode(metric) if mode is None else "min" if mode == "min" else "max"


def _public(row: Mapping[str, Any], outputs: Path) -> dict[str, Any]:
    return {name: str(outputs / "runs" / row["path"]) if name == "path" else row[name] for name in PUBLIC}


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """A JSON list, one object a line: of ten thousand, indenting takes seconds."""
    print("[" + ",\n ".join(json.dumps(row, allow_nan=False) for row in rows) + "]")


def _cell(row: Mapping[str, Any], name: str, now_secs: float) -> str:
    if name == "started":
        return age_text(row["started_at"] or "", now_secs)
    if name == "best":
        found = row["best"]
        return "–" if found is None else f"{found['metric']} {_number(found['value'])} at step {found['step']}"
    if name in ("code", "commit"):
        return _commit(row["code"])
    settings = row["settings"]
    choice = {name: settings.get(f"{name}.name")}
    return next((_number(place[name]) for place in (row, row["metrics"], settings, choice) if name in place), "–")


def _commit(code: Mapping[str, Any]) -> str:
    return f"{(code['commit'] or code['id'] or '–')[:12]}{'+' if code['dirty'] else ''}"


def _number(value: object) -> str:
    match value:
        case None:
            return "–"
        case str():
            return value
        case float():
            return f"{value:.4f}" if 0.001 <= abs(value) < 1000 else f"{value:.4g}"
        case _:
            return json.dumps(value)


def _print_best(rows: Sequence[Mapping[str, Any]], metric: str, outputs: Path) -> None:
    lines = [
        (
            row["run_key"],
            _number(row["best"]["value"]),
            str(row["best"]["step"]),
            row["state"],
            _commit(row["best"]["code"]),
            row["config_hash"][:11],
        )
        for row in rows
    ]
    print_table(("run", metric, "step", "state", "commit", "config"), lines, right=(metric, "step"))
    first = rows[0]
    named = f"{outputs / 'runs' / first['path']}@{first['best']['step']}"
    print(f"the best: dino-exp checkpoints show {plain(shlex.quote(named))}")


def _print_groups(groups: Sequence[Mapping[str, Any]], metric: str) -> None:
    differing = _differing([group["settings"] for group in groups])
    lines = [
        (
            group["group_hash"][:11],
            str(len(group["runs"])),
            _number(group["mean"]),
            "–" if group["std"] is None else _number(group["std"]),
            _number(group["min"]),
            _number(group["max"]),
            group["best"]["run_key"],
            *(with_short_digests(_number(group["settings"].get(key))) for key in differing),
        )
        for group in groups
    ]
    columns = ("group", "runs", f"mean {metric}", "std", "min", "max", "best run", *differing)
    print_table(columns, lines, right=[name for name in columns if name not in ("group", "best run")])


def _differing(settings: Sequence[Mapping[str, Any]], most: int = 4) -> list[str]:
    """The settings by which these groups differ, as far as a line has room."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1][:most]


def _tell_unread(unread: Mapping[str, str | None]) -> None:
    if unread:
        first, why = next(iter(unread.items()))
        _say(f"{count_text(len(unread), 'run')} cannot be read in full, {first} among them: {why}")
