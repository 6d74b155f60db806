"""What an attempt says at its beginning and at its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.attempts.target import changes_text
from dino_exp.config.typed import override, train_command
from dino_exp.loggers.console import print_facts, results_table

if TYPE_CHECKING:
    import torch

    from dino_exp.attempts.attempt import Attempt
    from dino_exp.runs.code_identity import CodeRecord
    from dino_exp.training.loop import Outcome
    from dino_exp.training.plan import TrainingPlan

HEALTH = ("loss", "entropy_ratio", "kl", "feature_std", "prototypes_used", "update_ratio")


def opening(
    attempt: Attempt,
    code: CodeRecord,
    plan: TrainingPlan,
    device: torch.device,
    num_threads: int,
    step: int,
    weights: Mapping[str, Any] | None,
) -> None:
    """The banner: which run this is, where it lies, what it begins with, and how to come back to it."""
    target, record = attempt.target, attempt.record
    assert record is not None
    commit = f"{code.commit[:12]}{' (dirty)' if code.dirty else ''}" if code.commit else f"none: {code.note}"
    threads = f", {num_threads} threads" if device.type == "cpu" else ""
    stop = "" if plan.stop_step == plan.horizon_steps else f", stopping at {plan.stop_step}"
    rows = [
        ("run", record.run_key),
        ("config", record.config_hash),
        ("commit", commit),
        ("device", f"{device}{threads}"),
        ("steps", f"{step} of {plan.horizon_steps} done ({plan.steps_per_epoch} an epoch){stop}"),
        ("directory", str(target.paths.directory)),
        ("resume", train_command(override("resume", target.paths.directory))),
    ]
    if weights is not None:
        rows.append(("weights", f"{weights['source']} of {weights['path']}: {weights['text']}"))
    rows += [("other code", train_command(override("resume", path))) for path in target.other_code]
    title = f"Attempt {attempt.number}: {'start' if attempt.number == 1 else 'continue'}"
    print_facts(attempt.console, title, rows)
    if target.changes:
        attempt.console.print(
            f"settings that differ from the run's first attempt:\n{changes_text(target.changes)}",
            markup=False,
        )


def closing(
    attempt: Attempt, outcome: Outcome, *, saved_step: int | None, reported: bool, profile: Path | None
) -> None:
    """The closing tables: k-NN at initialisation, now and of pixels; health; where things are."""
    record, console = attempt.record, attempt.console
    assert record is not None
    rows = read_rows(attempt)
    first = next((row for row in rows if row["step"] == 0), {})
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    if "knn_top1" in latest or "init_knn_top1" in first:
        console.print(results_table(first, latest))
    health = [(name, f"{latest[name]:.4g}") for name in HEALTH if isinstance(latest.get(name), float)]
    if health:
        print_facts(console, "Health", health)
    best = (
        "none yet"
        if record.best is None
        else f"{record.best.metric} {record.best.value:.4f} at step {record.best.step}"
    )
    saved = "nothing: no checkpoint exists" if saved_step is None else f"step {saved_step}"
    directory = attempt.paths.directory
    places = [
        ("outcome", outcome.state),
        ("best", best),
        ("saved", saved),
        ("directory", str(directory)),
        ("checkpoints", f"dino-exp checkpoints list {shlex.quote(str(directory))}"),
    ]
    if reported:
        places.append(("report", str(attempt.paths.report)))
    if profile is not None:
        places.append(("profile", str(profile)))
    if outcome.state != "completed":
        places.append(("go on", train_command(override("resume", directory))))
    print_facts(console, "Run", places)


def read_rows(attempt: Attempt) -> list[dict[str, Any]]:
    """The rows that the run has written so far."""
    with attempt.paths.metrics.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
