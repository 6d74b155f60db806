"""`dino-exp runs show`: everything about one run, where it came from, what came of it, and the line that starts it."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.catalogue.entry import RUNS, public
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument
from dino_exp.cli.show import Cell, plain, print_json, print_table
from dino_exp.errors import DinoExpError, UsageError
from dino_exp.runs.command import command_of
from dino_exp.runs.find import find_run
from dino_exp.runs.jsontext import spell
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import probe
from dino_exp.runs.record import RunRecord, load_record, shown_state
from dino_exp.words import age_text, count_text, size_text

_MAX_ANCESTORS = 100
_MAX_SHOWN_CHARS = 1000


def show(
    run: RunArgument,
    command: Annotated[bool, typer.Option("--command", help="Print only the line that starts this run.")] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Show one run: state, attempts, origin and children, metrics, checkpoints.

    \b
    Examples:
      dino-exp runs show last
      dino-exp runs show vit_nano-67b8 --json
      eval "$(dino-exp runs show last --command)"   # the same settings again
    """
    paths = RunPaths(find_run(outputs, run))
    record = load_record(paths.run_json)
    if record is None:
        raise UsageError(f"{paths.run_json}: there is no run")
    if command:
        print(command_of(paths))
        return
    found = describe(paths, record)
    if as_json:
        print_json(found)
        return
    _print(found, record)


def describe(paths: RunPaths, record: RunRecord) -> dict[str, Any]:
    """The fields of `runs list`, and: tags, note, schedule, attempts in full, lineage, checkpoints, trouble."""
    held = True
    with contextlib.suppress(DinoExpError):
        held = probe(paths, clock=time.time) is not None
    shown: Any = spell(vars(record.schedule))
    return {
        **public(record, str(paths.directory)),
        "state": shown_state(record, held),
        "tags": list(record.tags),
        "note": record.note,
        "variant": record.variant,
        "schedule": shown,
        "numerics": spell(record.numerics),
        "attempts_made": [spell({**vars(one), "code": vars(one.code)}) for one in record.attempts],
        "ancestors": _ancestors(paths, record),
        "children": _children(paths, record.run_key),
        "checkpoints": _checkpoints(paths),
        "weights": record.weights,
        "failed_save": None if record.failed_save is None else spell(vars(record.failed_save)),
    }


def _ancestors(paths: RunPaths, record: RunRecord) -> list[dict[str, Any]]:
    """The parent, its parent, and so on, as far as they lie beside this run."""
    found: list[dict[str, Any]] = []
    parent = record.parent
    while isinstance(parent, Mapping) and len(found) < _MAX_ANCESTORS:
        key = str(parent.get("run_key"))
        beside = paths.directory.parent / Path(key).name
        earlier = None
        with contextlib.suppress(DinoExpError, OSError):
            earlier = load_record(RunPaths(beside).run_json)
        found.append({"run_key": key, "step": parent.get("step"), "is_here": earlier is not None})
        parent = None if earlier is None else earlier.parent
    return found


def _children(paths: RunPaths, key: str) -> list[str]:
    """Runs beside this one that were forked from it."""
    if paths.directory.parent.name != RUNS:
        return []
    with contextlib.closing(Catalogue(paths.directory.parent.parent, say=lambda _: None).view()) as view:
        return [name for (name,) in view.rows("SELECT name FROM runs WHERE parent_key = ? ORDER BY name", [key])]


def _checkpoints(paths: RunPaths) -> dict[str, Any]:
    try:
        listing = CheckpointReader(paths.checkpoints).listing()
    except (DinoExpError, OSError) as problem:
        return {"num": None, "bytes": None, "problem": str(problem)}
    return {"num": len(listing.rows), "bytes": listing.disk_bytes, "problem": None}  # a shared pack counts once


def _print(found: Mapping[str, Any], record: RunRecord) -> None:
    now_secs = time.time()
    print_table(("run", ""), _facts(found))
    print()
    lines = [
        (
            str(one.number),
            age_text(one.started_at, now_secs),
            one.outcome or found["state"],
            one.host,
            "–" if one.resumed_from is None else str(one.resumed_from),
            "yes" if one.exact else "; ".join(one.why_not_exact),
            one.error or "",
        )
        for one in record.attempts
    ]
    print_table(("attempt", "started", "outcome", "host", "from step", "exact", "error"), lines, right=("attempt",))
    measured = [(name, f"{value:.6g}") for name, value in record.metrics.items()]
    if measured:
        print()
        print_table(("metric", "latest"), measured, right=("latest",))


def _weights_text(weights: Any) -> str:
    """What of which file the run began with; as it stands where no training has written it."""
    if not isinstance(weights, Mapping):
        return str(weights)[:_MAX_SHOWN_CHARS]
    path, text = (str(weights.get(name))[:_MAX_SHOWN_CHARS] for name in ("path", "text"))
    return f"{path} ({text}; {str(weights.get('digest'))[:20]}…)"


def _facts(found: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    schedule, code, best = found["schedule"], found["code"], found["best"]
    made = found["checkpoints"]
    held = made["problem"] or f"{count_text(made['num'], 'checkpoint')}, {size_text(made['bytes'])}"
    steps = f"{found['step']:,} of {schedule['horizon_steps']:,} ({schedule['steps_per_epoch']} an epoch)"
    origin = " ← ".join(
        f"{one['run_key']}@{one['step']}{'' if one['is_here'] else ' (not here)'}" for one in found["ancestors"]
    )
    trouble = [] if found["failed_save"] is None else [("not saved", found["failed_save"]["error"])]
    noted = [(name, value) for name in ("note", "variant") if (value := found[name])]
    return [
        ("key", found["run_key"]),
        ("state", found["state"]),
        ("step", steps),
        ("best", "–" if best is None else f"{best['metric']} {best['value']:.6g} at step {best['step']}"),
        ("checkpoints", held),
        *trouble,
        ("config", found["config_hash"]),
        ("group", found["group_hash"]),
        ("commit", f"{code['commit'] or '–'}{' with uncommitted changes' if code['dirty'] else ''}"),
        ("code", code["id"]),
        ("data", found["data_fingerprint"] or "–"),
        ("forked from", origin or "–"),
        *([] if found["weights"] is None else [("weights", _weights_text(found["weights"]))]),
        ("children", ", ".join(found["children"]) or "–"),
        *([("tags", ", ".join(found["tags"]))] if found["tags"] else []),
        *noted,
        ("directory", found["path"]),
        ("start again", f"dino-exp runs show {plain(shlex.quote(found['path']))} --command"),
    ]
