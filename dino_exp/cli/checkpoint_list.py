"""`dino-exp checkpoints list`: the checkpoints of a run, what they are and what they take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dino_exp.checkpoint.policies import BestN, KeepAny
from dino_exp.cli.arguments import OUTPUTS, JsonOption, Named, OutputsOption, RunAtArgument, named
from dino_exp.cli.show import Cell, console, kinds_text, metric_text, plain, print_json, print_table
from dino_exp.words import age_text, count_text, size_text

_WIDE = 100  # characters of a terminal in which all columns fit

_SIZES = ("size", "stored", "alone")


def list_all(run: RunAtArgument, outputs: OutputsOption = OUTPUTS, as_json: JsonOption = False) -> None:
    """List the checkpoints of a run, oldest first.

    `size` is that of the state, `stored` what it takes on the disk with all
    that it needs of other checkpoints, `alone` what would be free if only
    this one went.

    \b
    Examples:
      dino-exp checkpoints list last
      dino-exp checkpoints list vit_nano-67b8 --json
    """
    wanted = named(run, outputs)
    reader, at = wanted.reader, wanted.at
    step = None if at is None else reader.resolve(at)
    listing = reader.listing()
    rows = [row for row in listing.rows if step in (None, row["step"])]
    if as_json:
        print_json(rows)
        return
    if rows:
        metrics = _metrics(listing.policy, rows)
        now_secs = time.time()
        lines = [_line(row, metrics, now_secs) for row in rows]
        columns: tuple[str, ...] = ("step", "epoch", "kinds", *metrics, *_SIZES, "age", "verified", "state")
        if console().width < _WIDE:
            columns, lines = columns[:-1], [line[:-1] for line in lines]
        print_table(columns, lines, right=("step", "epoch", *metrics, *_SIZES, "age"))
        if step is None:
            content = size_text(sum(row["content_bytes"] for row in rows))
            print(f"{count_text(len(rows), 'checkpoint')}: {size_text(listing.disk_bytes)} on the disk for {content}")
    _tell_unread(wanted, listing.num_unreadable if step is None else 0, found_some=bool(rows))


def _tell_unread(wanted: Named, num_unread: int, *, found_some: bool) -> None:
    if num_unread > 0:
        why = f"dino-exp checkpoints verify {plain(wanted.quoted)}"
        print(f"{count_text(num_unread, 'checkpoint')} cannot be read; why: {why}")
    elif not found_some:
        print("no checkpoints yet")


def _metrics(policy: KeepAny, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The columns: what the run is judged by, and the loss."""
    ranked = [rule.metric for rule in policy.rules if isinstance(rule, BestN)]
    measured = {name for row in rows for name in row["metrics"]}
    return [name for name in dict.fromkeys([*ranked, "knn_top1", "loss"]) if name in measured]


def _line(row: dict[str, Any], metrics: Sequence[str], now_secs: float) -> tuple[Cell, ...]:
    return (
        str(row["step"]),
        str(row["epoch"]),
        kinds_text(row["kinds"]),
        *(metric_text(row["metrics"], name) for name in metrics),
        size_text(row["content_bytes"]),
        size_text(row["bytes"]),
        size_text(row["frees_bytes"]),
        age_text(row["created_at"], now_secs),
        ("yes" if row["verified"] else "no") + ("" if row["resumable"] else ", thinned"),
        (row["state_digest"] or "")[:11],
    )
