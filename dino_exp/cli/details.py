"""`dino-exp checkpoints show`: everything about one checkpoint."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dino_exp.analysis.names import part_of
from dino_exp.checkpoint.policies import (
    BestN,
    EveryNEpochs,
    KeepRule,
    LatestN,
    Milestones,
    Pinned,
    retention_from_json,
)
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunAtArgument, named
from dino_exp.cli.show import Cell, kinds_text, print_json, print_table
from dino_exp.errors import ConfigError
from dino_exp.words import age_text, size_text


def show(
    checkpoint: RunAtArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="Each tensor, not only each part.")] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Show one checkpoint (the latest): its origin, metrics, health and content.

    \b
    Examples:
      dino-exp checkpoints show last
      dino-exp checkpoints show last@best --tensors
      dino-exp checkpoints show vit_nano-67b8@770 --json
    """
    wanted = named(checkpoint, outputs)
    found = wanted.reader.show(wanted.at or "latest")
    if as_json:
        print_json(found)
        return
    print_table(("checkpoint", ""), _facts(found, time.time()))
    for title in ("metrics", "health"):
        if found[title]:
            print()
            lines = [(name, _number(value)) for name, value in found[title].items()]
            print_table((title, "value"), lines, right=("value",))
    print()
    packs = [(pack["name"], size_text(pack["bytes"])) for pack in found["packs"]]
    print_table(("pack", "size"), packs, right=("size",))
    print()
    if tensors:
        print_table(("tensor", "dtype", "shape", "size"), list(map(_tensor_line, found["tensors"])), right=("size",))
    else:
        print_table(("part", "tensors", "size"), _part_lines(found["tensors"]), right=("tensors", "size"))


def _facts(found: dict[str, Any], now_secs: float) -> list[tuple[str, Cell]]:
    """Names and values, in the order of what people ask first."""
    created_at = found.get("created_at", "")
    note = [] if found["note"] is None else [("pinned because", found["note"] or "– (no note)")]
    return [
        ("step", f"{found['step']:,} (epoch {found['epoch']}, {found['samples_seen']:,} samples seen)"),
        ("kinds", kinds_text(found.get("kinds", ()))),
        *note,
        ("saved because", "; ".join(found["reasons"])),
        ("created", f"{created_at} ({age_text(created_at, now_secs)})"),
        *_origin(found),
        ("state", str(found.get("state_digest") or "–")),
        ("resumable", _yes(found.get("resumable"))),
        ("verified", _yes(found.get("verified"))),
        ("healthy", _yes(found["healthy"])),
        ("policy", _policy_text(found["policy"])),
        ("size", size_text(found.get("bytes", 0))),
    ]


def _origin(found: dict[str, Any]) -> list[tuple[str, Cell]]:
    """What made it. A record holds whatever its writer put there, so nothing is taken for granted."""
    record, parent = found["record"], found["parent"]
    dirty = {"True": " with uncommitted changes", "False": ""}.get(str(record.get("git_dirty")), "")
    if isinstance(parent, dict):
        parent = " ".join(f"{name} {value}" for name, value in parent.items())
    return [
        ("run", str(record.get("run_key") or "–")),
        ("parent", str(parent or "–")),
        ("config", str(record.get("config_hash") or "–")),
        ("commit", f"{record.get('git_commit') or '–'}{dirty}"),
        ("code", str(record.get("code_id") or "–")),
        ("data", str(record.get("data_fingerprint") or "–")),
        (
            "written by",
            f"attempt {found['attempt']}, {found['world_size']} process(es), format {found['format_version']}",
        ),
    ]


def _policy_text(policy: Any) -> str:
    try:
        return "keep " + "; ".join(map(_rule_text, retention_from_json(policy).rules))
    except ConfigError:
        return "of a version that is not known here"


def _rule_text(rule: KeepRule) -> str:
    match rule:
        case LatestN(num):
            return "all" if num == sys.maxsize else f"last {num}"
        case BestN(metric, mode, num):
            return f"best {num} by {metric} ({mode})"
        case Milestones(milestones):
            return f"milestones {', '.join(milestone.text for milestone in milestones) or 'of earlier settings'}"
        case EveryNEpochs(num_epochs):
            return f"every {num_epochs} epochs"
        case Pinned():
            return "pinned"
        case _:
            return type(rule).__name__


def _tensor_line(tensor: dict[str, Any]) -> tuple[str, ...]:
    shape = "×".join(map(str, tensor["shape"])) or "scalar"
    return tensor["name"], tensor["dtype"], shape, size_text(tensor["bytes"])


def _part_lines(tensors: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """For each part, such as `student` or `optimizer`: how many tensors, how many bytes."""
    num_bytes: Counter[str] = Counter()
    for tensor in tensors:
        num_bytes[part_of(tensor["name"])] += tensor["bytes"]
    nums = Counter(part_of(tensor["name"]) for tensor in tensors)
    return [(part, str(num), size_text(num_bytes[part])) for part, num in nums.items()]


def _number(value: Any) -> str:
    """Six digits wherever the point is: a learning rate or an update ratio is small."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _yes(value: object) -> str:
    return "yes" if value else "no"
