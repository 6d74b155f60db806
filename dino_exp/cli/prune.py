"""`dino-exp checkpoints prune`: drop what the policy does not keep, or say what would go and why."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import typer
from rich.text import Text

from dino_exp.checkpoint.layout import REGISTRY
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.policies import retention_to_json
from dino_exp.checkpoint.pruning import PrunePlan, PruneRules, Shrunk, less_damaged
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.types import Schedule
from dino_exp.cli.arguments import OUTPUTS, JsonOption, Named, OutputsOption, RunArgument, named_run
from dino_exp.cli.owning import own
from dino_exp.cli.show import Cell, kinds_text, plain, print_json, print_table
from dino_exp.dino.parts import COMPANIONS, THIN_PARTS
from dino_exp.runs.events import EventLog
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import RunLock
from dino_exp.words import count_text, size_text


class Thin(StrEnum):
    """What stays of a thinned milestone."""

    TEACHER = "teacher"
    MODELS = "models"


class Mode(StrEnum):
    """Which end of a metric is the better one."""

    MAX = "max"
    MIN = "min"


def prune(
    run: RunArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go, and why.")] = False,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=0, metavar="N", help="Keep the N newest, instead of as recorded.")
    ] = None,
    keep_best: Annotated[
        int | None, typer.Option("--keep-best", min=0, metavar="N", help="Keep the N best, instead of as recorded.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="Best by this metric, instead of the recorded one.")
    ] = None,
    mode: Annotated[
        Mode | None, typer.Option("--mode", help="Whether high or low is better, for a metric not recorded.")
    ] = None,
    thin: Annotated[
        Thin | None,
        typer.Option("--thin", help="Of older milestones keep only the teacher, or the models (student too)."),
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Free kept checkpoints of what they need of dropped ones.")
    ] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Drop the checkpoints that the run's policy does not keep.

    The policy is the one that the newest checkpoint records; an option
    replaces the rule that it is about, for this once. Milestones and pins
    always stay, and so do the newest checkpoint, the last healthy one and the
    newest that is verified. A run in use is refused (exit 3): it prunes itself
    at each save. --dry-run changes nothing, and looks at any run.

    With --thin, milestones that no other rule keeps lose the rest of their
    state: they can be evaluated and exported, not resumed. With --compact,
    checkpoints that were written as changes since one that is gone are
    written anew, so that it need not stay on the disk for their sake.

    \b
    Examples:
      dino-exp checkpoints prune last --dry-run
      dino-exp checkpoints prune last --keep-last 1
      dino-exp checkpoints prune last --keep-best 2 --metric val_loss --mode min
      dino-exp checkpoints prune last --thin teacher --compact
    """
    rules = PruneRules(
        last=keep_last,
        best=keep_best,
        metric=metric,
        mode=None if mode is None else mode.value,
        thin=None if thin is None else THIN_PARTS[thin.value],
    )
    wanted = named_run(run, outputs, "prune")
    # Where nothing was ever saved there is nothing to own the run for, and no folder is to be made.
    only_look = dry_run or wanted.reader.num_found() == 0
    if only_look:
        planned, shrunk = wanted.reader.plan_prune(rules), Shrunk()
    else:
        planned, shrunk = _carry_out(wanted, rules, compact=compact)
    if as_json:
        print_json(_for_programs(planned, shrunk, dry_run=dry_run))
    else:
        _tell(wanted, planned, shrunk, dry_run=dry_run)


def _carry_out(wanted: Named, rules: PruneRules, *, compact: bool) -> tuple[PrunePlan, Shrunk]:
    """Prune as the run's owner. Raises LockedError that names another owner."""
    paths = wanted.paths
    refusal = (
        f"nothing was dropped. It prunes itself at each save; what would go now: "
        f"dino-exp checkpoints prune {wanted.quoted} --dry-run"
    )
    with _own(paths, refusal) as lock, contextlib.closing(EventLog(paths.events, time.time)) as events:
        lock.start_heartbeat()  # thousands of packs on a slow disk take longer than another host would wait
        recorded = wanted.reader.recorded_policy()
        ledger = Ledger(paths.checkpoints, keep=recorded, on_event=partial(_note, events))
        lock.check()
        done = ledger.prune(rules)
        shrunk = _shrink(ledger, done, lock.check, compact=compact)
        done = less_damaged(replace(done, freed_bytes=done.freed_bytes + shrunk.freed_bytes), ledger.damaged)
        if done.plan.drop or shrunk != Shrunk():
            _note(events, "pruned", policy=retention_to_json(rules.instead_of(recorded)), freed_bytes=done.freed_bytes)
    return done, shrunk


def _own(paths: RunPaths, refusal: str) -> RunLock:
    """The run's lock, also where the disk is full, which is when people prune: the registry, derived, makes room."""
    try:
        return own(paths, refusal)
    except OSError as problem:
        registry = paths.checkpoints / REGISTRY
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT) or not registry.is_file():
            raise
        registry.unlink()
        return own(paths, refusal)


def _note(events: EventLog, kind: str, **fields: Any) -> None:
    """For the record; a full disk does not keep it from being emptied."""
    try:
        events.append(kind, **fields)
    except OSError as problem:
        print(f"dino-exp: events.jsonl does not say {kind!r}: {problem.strerror}", file=sys.stderr)


def _shrink(ledger: Ledger, done: PrunePlan, guard: Callable[[], object], *, compact: bool) -> Shrunk:
    from dino_exp.checkpoint.shrinking import Shrinker  # numpy: only here

    shrinker = Shrinker(ledger, Storage(codec="zstd", companions=COMPANIONS), guard)
    try:
        thinned = shrinker.thin(done.plan.thin)
        rewritten = shrinker.compact(everything=True) if compact else Shrunk()
    finally:
        ledger.renew_registry(ledger.schedule or Schedule(1, 1))
    return Shrunk(thinned.thinned, rewritten.rewritten, thinned.freed_bytes + rewritten.freed_bytes)


def _for_programs(planned: PrunePlan, shrunk: Shrunk, *, dry_run: bool) -> dict[str, Any]:
    return {
        "kept": list(planned.plan.keep),
        "dropped": list(planned.plan.drop),
        "thinned": sorted(planned.plan.thin) if dry_run else list(shrunk.thinned),
        "rewritten": list(shrunk.rewritten),
        "reasons": {str(step): why for step, why in sorted(planned.plan.reasons.items())},
        "damaged": {str(step): why for step, why in sorted(planned.damaged.items())},
        "freed_bytes": planned.freed_bytes,
        "foreign_bytes": planned.foreign_bytes if dry_run or not shrunk.rewritten else 0,
        "dry_run": dry_run,
    }


def _tell(wanted: Named, planned: PrunePlan, shrunk: Shrunk, *, dry_run: bool) -> None:
    if not planned.infos and not planned.damaged:
        print("no checkpoints yet")
        return
    columns = ("step", "epoch", "kinds", "size", "plan", "why")
    lines = [
        *_lines(planned),
        *((str(step), "", "", "", _verdict("damaged"), why) for step, why in planned.damaged.items()),
    ]
    print_table(columns, sorted(lines, key=lambda line: int(str(line[0]))), right=("step", "epoch", "size"))
    if planned.damaged:
        print(f"damaged ones stay; more about them: dino-exp checkpoints verify {plain(wanted.quoted)}")
    print(_plan_text(planned) if dry_run else _done_text(planned, shrunk))
    if planned.foreign_bytes and not shrunk.rewritten:
        size = size_text(planned.foreign_bytes)
        print(f"{size} of dropped ones stay because others build on them; to write those anew: add --compact")


def _plan_text(planned: PrunePlan) -> str:
    drop, thin = len(planned.plan.drop), len(planned.plan.thin)
    parts = [f"{count_text(drop, 'checkpoint')} would go"] * bool(drop) + [f"{thin} would be thinned"] * bool(thin)
    left = f"{count_text(len(planned.plan.keep), 'checkpoint')}"
    if not parts:
        return f"nothing to drop; {left} stay"
    return f"{', '.join(parts)}, {size_text(planned.freed_bytes)} freed; {left} would stay. Nothing was changed"


def _done_text(planned: PrunePlan, shrunk: Shrunk) -> str:
    done = {
        f"dropped {count_text(len(planned.plan.drop), 'checkpoint')}": planned.plan.drop,
        f"thinned {len(shrunk.thinned)}": shrunk.thinned,
        f"wrote {len(shrunk.rewritten)} anew": shrunk.rewritten,
    }
    parts = [text for text, steps in done.items() if steps]
    left = f"{count_text(len(planned.plan.keep), 'checkpoint')}"
    if not parts:
        return f"nothing to drop; {left} stay"
    return f"{', '.join(parts)}, freed {size_text(planned.freed_bytes)}; {left} left"


def _lines(planned: PrunePlan) -> list[tuple[Cell, ...]]:
    return [
        (
            str(info.step),
            str(info.epoch),
            kinds_text(planned.kinds[info.step]),
            size_text(info.bytes),
            _verdict(verdict),
            why,
        )
        for info in planned.infos
        for verdict, _, why in [planned.plan.reasons[info.step].partition(": ")]
    ]


_STYLES = {"keep": "green", "thin": "yellow", "drop": "red", "damaged": "bold red"}


def _verdict(word: str) -> Text:
    return Text(word, _STYLES.get(word.partition(" ")[0], ""))
