"""`fork=`: a new run that starts from another run's checkpoint, and records its parent.

The state's digest becomes part of the new run's identity (`origin`). `@latest` and `@best` are resolved once and
written down with the child, so the same command later continues that child, however far the parent has gone meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dino_exp.attempts.target import PACKAGE, Target, existing_or_new, without_stop
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.canonical import config_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compare import overlay
from dino_exp.config.stored import load_stored
from dino_exp.errors import ConfigError, NoCheckpointError, RefusedError, UsageError
from dino_exp.runs.code_identity import code_id
from dino_exp.runs.find import find_run, split_at
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What a child records: whose state it began with, at which step, and what the command said.

    `settings` is the hash of the child's settings without the origin: the same command again finds the child by it.
    """

    run_key: str
    step: int
    state_digest: str
    asked: str
    settings: str


def fork_target(composed: Mapping[str, Any], touched: Collection[str]) -> Target:
    """The child that `fork=` leads to: the parent's settings with the overrides in `touched` (dotted keys).

    Raises UsageError where there is no such run or word, NoCheckpointError where it has no such checkpoint.
    """
    outputs = Path(composed["paths"]["outputs"])
    named, at = split_at(str(composed["fork"]))
    directory = find_run(outputs, named)
    record = load_record(RunPaths(directory).run_json)
    if record is None:
        raise UsageError(f"{directory}: no run.json, so there is nothing to fork from")
    wanted = replace(overlay(without_stop(load_stored(directory)), config_from_mapping(composed), touched), origin=None)
    wanted = replace(wanted, paths=replace(wanted.paths, outputs=str(outputs)))
    asked, settings = f"{record.run_key}@{at or 'latest'}", config_hash(wanted)
    parent = _earlier_child(outputs, asked, settings, wanted.run.variant) or _resolve(
        directory, record, at, asked, settings
    )
    child = existing_or_new(replace(wanted, origin=parent.state_digest))
    return replace(child, parent=asdict(parent), parent_directory=directory)


def _resolve(directory: Path, record: RunRecord, at: str | None, asked: str, settings: str) -> Parent:
    manifest = CheckpointReader(RunPaths(directory).checkpoints).manifest(at or "latest")
    if manifest.state_digest is None:
        raise NoCheckpointError(f"{asked}: this checkpoint has no digest of its state; fork from another one")
    return Parent(
        run_key=record.run_key, step=manifest.step, state_digest=manifest.state_digest, asked=asked, settings=settings
    )


def _earlier_child(outputs: Path, asked: str, settings: str, variant: str | None) -> Parent | None:
    """The parent as the child of the same command, made by the same code, has written it down."""
    code = code_id(PACKAGE)
    for path in sorted((outputs / "runs").glob("*/run.json")):
        record = load_record(path)
        parent: Any = None if record is None else record.parent
        if record is None or not isinstance(parent, dict) or record.code.id != code:
            continue
        if (parent.get("asked"), parent.get("settings"), record.variant) == (asked, settings, variant):
            return Parent(**parent)
    return None


def parent_checkpoints(target: Target) -> tuple[CheckpointReader, int] | None:
    """Where a child without a checkpoint of its own takes its first state from; None for a run that is no child.

    Raises NoCheckpointError where the parent cannot be found.
    """
    recorded: Any = None if target.record is None else target.record.parent
    parent = target.parent or recorded
    if not isinstance(parent, Mapping):
        return None
    directory = target.parent_directory or target.paths.directory.parent / parent["run_key"]
    checkpoints = RunPaths(directory).checkpoints
    if not checkpoints.is_dir():
        raise NoCheckpointError(
            f"{target.paths.directory}: has no checkpoint of its own yet, and its parent {parent['run_key']} is not "
            f"beside it; start again with `fork={parent['asked']}`"
        )
    reader = CheckpointReader(checkpoints)
    if reader.manifest(parent["step"]).state_digest != parent["state_digest"]:
        raise RefusedError(
            f"{directory}: its step {parent['step']} is not the state that {target.paths.directory} began with"
        )
    return reader, int(parent["step"])


def check_calendar(target: Target, *, steps_per_epoch: int, horizon_steps: int) -> None:
    """Refuse a child whose epochs have another length than its parent's, or that would begin behind its horizon."""
    if target.parent is None or target.parent_directory is None:
        return
    record = load_record(RunPaths(target.parent_directory).run_json)
    assert record is not None
    if record.schedule.steps_per_epoch != steps_per_epoch:
        raise ConfigError(
            f"fork: an epoch of the parent has {record.schedule.steps_per_epoch} steps, of the fork {steps_per_epoch}; "
            "steps go on counting, so keep train.batch_size and the data, or start a new run"
        )
    if target.parent["step"] >= horizon_steps:
        raise ConfigError(
            f"fork: it would begin at step {target.parent['step']} of {horizon_steps}; extend it: train.epochs=<more>"
        )
