"""`fork=`: a new run that starts from another run's checkpoint, and records its parent.

The state's digest becomes part of the new run's identity (`origin`). `@latest` and `@best` are resolved once and
written down with the child, so the same command later continues that child, however far the parent has gone meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from dino_exp.attempts.data_files import apart_from_files, with_files_at, with_files_of_fork
from dino_exp.attempts.target import (
    KEPT,
    Target,
    before_horizon,
    existing_or_new,
    readable_record,
    stored_settings,
    without_stop,
)
from dino_exp.attempts.whole import check_whole, nearest, whole_steps
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import Schedule
from dino_exp.config.canonical import config_hash
from dino_exp.config.check import asked_from_mapping
from dino_exp.config.compare import compare, overlay, roles_by_key, values_by_key
from dino_exp.config.schema import Config
from dino_exp.config.typed import override, setting_text
from dino_exp.errors import ConfigError, NoCheckpointError, RefusedError, UsageError
from dino_exp.runs.code_identity import PACKAGE_DIR, code_id
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


def fork_target(composed: Mapping[str, Any], touched: Collection[str], typed: Sequence[str] = ()) -> Target:
    """The child that `fork=` leads to: the parent's settings with the overrides in `touched` (dotted keys).

    `typed`: the overrides, word by word, for a line to type where it is refused.

    Raises UsageError where there is no such run or word, NoCheckpointError where it has no such checkpoint or only a
    part of it, ConfigError where the settings cannot go on from that state.
    """
    outputs = Path(composed["paths"]["outputs"])
    composed, of_files = apart_from_files(composed, touched)
    asked_config = asked_from_mapping(composed)

    def settings_of(directory: Path) -> Config:
        parents = with_files_at(without_stop(stored_settings(directory)), of_files)
        wanted = overlay(parents, asked_config, set(touched) - of_files.keys())
        return replace(with_files_of_fork(wanted, touched), origin=None, paths=asked_config.paths)

    named, at = split_at(str(composed["fork"]))
    directory = None if named == "last" else find_run(outputs, named)  # "last" is another run after the first fork
    asked = f"{'last' if directory is None else directory.name}@{at or 'latest'}"
    for child in _children(outputs, asked):
        origin = outputs / "runs" / str(child["run_key"]) if directory is None else directory
        if origin.is_dir() and config_hash(settings_of(origin)) == child["settings"]:
            return _target(settings_of(origin), Parent(**child), origin, typed)
    directory = find_run(outputs, named) if directory is None else directory
    config = settings_of(directory)
    return _target(config, _resolve(directory, config, at, asked), directory, typed)


def _target(config: Config, parent: Parent, directory: Path, typed: Sequence[str]) -> Target:
    child = existing_or_new(replace(config, origin=parent.state_digest), typed)
    if child.record is None:
        _check_fit(stored_settings(directory), config, parent, directory)
    return replace(child, parent=asdict(parent), parent_directory=directory)


def _check_fit(was: Config, now: Config, parent: Parent, directory: Path) -> None:
    before, after = values_by_key(was), values_by_key(now)
    differing = [key for key in KEPT if before.get(key) != after.get(key)]
    if differing:
        lines = [
            f"  {key}: {setting_text(before.get(key))} there, {setting_text(after.get(key))} asked for"
            for key in differing
        ]
        raise ConfigError(
            "fork: the state of the parent is made for other settings:\n" + "\n".join(lines) + "\n"
            "keep them, or start a new run without `fork=`"
        )
    if was.data == now.data:  # other images may give other epochs: `check_schedule` knows once they are there
        per_epoch = _parent_record(directory).schedule.steps_per_epoch
        _check_horizon(directory, parent.step, Schedule(now.train.epochs * per_epoch, per_epoch))


def check_schedule(target: Target, schedule: Schedule) -> None:
    """Refuse a child that would begin where its schedule has ended, or inside an epoch of its parent that it cuts anew.

    Steps go on counting, so what was trained before stays whole epochs. Raises ConfigError, with what would do.
    """
    if target.record is not None or target.parent is None or target.parent_directory is None:
        return
    step, directory = int(target.parent["step"]), target.parent_directory
    theirs = _parent_record(directory).schedule.steps_per_epoch
    if theirs != schedule.steps_per_epoch and step % theirs:
        reader = CheckpointReader(RunPaths(directory).checkpoints)
        ends = [one for one in whole_steps(reader) if one % theirs == 0]
        instead = " or ".join(f"`{override('fork', f'{directory}@{one}')}`" for one in nearest(ends, step))
        raise ConfigError(
            f"fork: step {step} lies inside an epoch of the parent, which has {theirs} steps an epoch; with these data "
            f"there are {schedule.steps_per_epoch}, so it has to begin at the end of one: {instead or 'none is left'}"
        )
    _check_horizon(directory, step, schedule)


def _parent_record(directory: Path) -> RunRecord:
    record = load_record(RunPaths(directory).run_json)
    assert record is not None
    return record


def _check_horizon(directory: Path, step: int, schedule: Schedule) -> None:
    horizon, per_epoch = schedule.horizon_steps, schedule.steps_per_epoch
    if step < horizon:
        return
    earlier = before_horizon(directory, horizon)
    instead = f", or begin earlier: {override('fork', f'{directory}@{earlier}')}" if earlier is not None else ""
    raise ConfigError(
        f"fork: it would begin at step {step} of {horizon}; extend it: train.epochs={step // per_epoch + 1} or more"
        f"{instead}"
    )


def _resolve(directory: Path, config: Config, at: str | None, asked: str) -> Parent:
    record = load_record(RunPaths(directory).run_json)
    if record is None:
        raise UsageError(f"{directory}: no run.json, so there is nothing to fork from")
    reader = CheckpointReader(RunPaths(directory).checkpoints)
    manifest = reader.manifest(at or "latest")
    check_whole(reader, manifest, override("fork", asked))
    return Parent(
        run_key=directory.name,
        step=manifest.step,
        state_digest=reader.state_digest(manifest.step),
        asked=asked,
        settings=config_hash(config),
    )


def _children(outputs: Path, asked: str) -> Iterator[dict[str, Any]]:
    """What the children of the same words, made by the same code, have written down about their parents."""
    code = code_id(PACKAGE_DIR)
    names = {field.name for field in fields(Parent)}
    for path in sorted((outputs / "runs").glob("*/run.json")):
        record = readable_record(path)
        parent: Any = None if record is None else record.parent
        if record is None or not isinstance(parent, dict) or record.code.id != code:
            continue
        if parent.keys() == names and parent["asked"] == asked:
            yield parent


def _is_parent(given: Mapping[str, Any]) -> bool:
    """Whether it is what `Parent` says; its run is named by one part of a path, so that it lies beside the child."""
    if given.keys() != {field.name for field in fields(Parent)} or type(given["step"]) is not int or given["step"] < 0:
        return False
    texts = [value for name, value in given.items() if name != "step"]
    key = given["run_key"]
    return all(isinstance(text, str) for text in texts) and Path(key).name == key and "\0" not in key


def _parent(target: Target) -> Mapping[str, Any] | None:
    """What a child records of its parent; None for a run that is no child. Raises RefusedError."""
    recorded: Any = None if target.record is None else target.record.parent
    parent = target.parent or recorded
    if not isinstance(parent, Mapping):
        return None
    if not _is_parent(parent):
        raise RefusedError(f"{target.paths.run_json}: parent is {str(parent)[:80]!r}, which no fork has written")
    return parent


def _parent_directory(target: Target, parent: Mapping[str, Any]) -> Path:
    return target.parent_directory or target.paths.directory.parent / str(parent["run_key"])


def parent_checkpoints(target: Target) -> tuple[CheckpointReader, int] | None:
    """Where a child without a checkpoint of its own takes its first state from; None for a run that is no child.

    Raises NoCheckpointError where the parent cannot be found, or is not whole any more.
    """
    parent = _parent(target)
    if parent is None:
        return None
    directory = _parent_directory(target, parent)
    checkpoints = RunPaths(directory).checkpoints
    if not checkpoints.is_dir():
        raise NoCheckpointError(
            f"{target.paths.directory}: has no checkpoint of its own yet, and its parent {parent['run_key']} is not "
            f"beside it; start again with `{override('fork', parent['asked'])}`"
        )
    reader = CheckpointReader(checkpoints)
    manifest = reader.manifest(parent["step"])
    check_whole(reader, manifest, override("fork", parent["asked"]))
    if reader.state_digest(manifest.step) != parent["state_digest"]:
        raise RefusedError(
            f"{directory}: its step {parent['step']} is not the state that {target.paths.directory} began with"
        )
    return reader, int(parent["step"])


def has_other_data(target: Target) -> bool:
    """Whether a child trains on other data than its parent, so that what was measured there is no measure here."""
    parent = _parent(target)
    assert parent is not None
    changes = compare(stored_settings(_parent_directory(target, parent)), target.config, roles_by_key())
    return any(change.key.startswith("data.") and change.role == "identity" for change in changes)
