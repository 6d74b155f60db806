"""Where a command leads: which run directory, with which settings, and whether the rules let it go on.

Every spelling of the same settings arrives at the same directory, because its name is a function of settings and code.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dino_exp.attempts.data_files import CHOICE, apart_from_files, with_files, with_files_at
from dino_exp.attempts.initial import touched_with_digest, with_weights, with_weights_of_start
from dino_exp.attempts.whole import nearest, whole_steps
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.canonical import config_hash
from dino_exp.config.check import asked_from_mapping, config_from_mapping
from dino_exp.config.compare import Change, compare, overlay, roles_by_key
from dino_exp.config.schema import Config
from dino_exp.config.stored import load_stored
from dino_exp.config.typed import override, setting_text, train_command
from dino_exp.errors import ConfigError, DinoExpError, RefusedError, UsageError
from dino_exp.runs.code_identity import PACKAGE_DIR, code_id
from dino_exp.runs.command import key_of, words_with
from dino_exp.runs.find import find_run, split_at
from dino_exp.runs.job import job_of
from dino_exp.runs.key import RunKey, choose_name, parse_run_key
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record

log = logging.getLogger(__name__)

RUN_DIR_VARIABLE = "DINO_EXP_RUN_DIR"

# What a state is made for. Another value needs another state, so a fork keeps these.
KEPT = (
    "model.embed_dim", "model.depth", "model.num_heads", "model.mlp_ratio", "data.image_size", "data.patch_size",
    "data.name", "data.num_samples", "loss.out_dim", "loss.hidden_dim", "loss.bottleneck_dim", "loss.num_layers",
    "loss.use_bn", "optimizer.name", "train.batch_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Target:
    """The run directory that a command leads to. `record` is None when no run is there yet."""

    paths: RunPaths
    key: RunKey
    config: Config
    record: RunRecord | None
    changes: tuple[Change, ...]
    other_code: tuple[Path, ...] = ()
    parent: Mapping[str, Any] | None = None
    parent_directory: Path | None = None

    @property
    def code_changed(self) -> bool:
        """Whether the run that is there was made by other code than this."""
        return self.record is not None and self.record.code.id != self.key.code_id


def start_target(composed: Mapping[str, Any], typed: Sequence[str] = ()) -> Target:
    """The run of these settings and this code: an existing one, or a new directory's name.

    `typed`: the overrides, word by word, for a line to type where it is refused; so in the functions below.
    Raises ConfigError for impossible settings, RefusedError where DINO_EXP_RUN_DIR holds a run of other settings.
    """
    config = config_from_mapping(composed)
    if config.origin is not None:
        raise ConfigError("origin is set by a fork; use `fork=<run>[@best|@latest|@<step>]`")
    return existing_or_new(with_weights_of_start(with_files(config)), typed)


def existing_or_new(config: Config, typed: Sequence[str] = ()) -> Target:
    """The run of these settings and this code, wherever it lies. Raises RefusedError as `start_target` does."""
    key = RunKey(
        model=config.model.name,
        config_hash=config_hash(config),
        code_id=code_id(PACKAGE_DIR),
        variant=config.run.variant,
    )
    runs = Path(config.paths.outputs) / "runs"
    given = os.environ.get(RUN_DIR_VARIABLE)
    began = None if given else _begun_by_this_job(runs, key)
    directory = Path(given) if given else began or runs / choose_name(key, lambda name: _holder(runs / name))
    paths = RunPaths(directory)
    record = load_record(paths.run_json)
    if record is None and any(paths.checkpoints.glob("step-*.json")):
        raise RefusedError(
            f"{paths.directory}: holds checkpoints and no run.json, so it is not known whose they are; put run.json "
            "back, or set `run.variant=<name>` for a directory of its own"
        )
    changes = [] if record is None else compare(settings_of_record(paths, record), config, roles_by_key())
    refuse_identity_changes(paths, changes, typed, is_given=bool(given))
    return Target(
        paths=paths,
        key=key,
        config=config,
        record=record,
        changes=tuple(changes),
        other_code=_other_code(runs, key),
    )


def resume_target(composed: Mapping[str, Any], touched: Collection[str], typed: Sequence[str] = ()) -> Target:
    """The run that `resume=` names, with its own settings and the overrides in `touched` (dotted keys).

    Raises UsageError where there is no such run, RefusedError where an override changes the run's identity.
    """
    outputs = Path(composed["paths"]["outputs"])
    named, at = split_at(str(composed["resume"]))
    directory = find_run(outputs, named)
    paths = RunPaths(directory)
    refuse_older(paths, at)
    record = load_record(paths.run_json)
    if record is None:
        raise UsageError(f"{directory}: no run.json, so no run began here; `python -m dino_exp.train` starts one")
    stored = without_stop(settings_of_record(paths, record))
    composed, of_files = apart_from_files(composed, touched)
    asked, touched = with_weights(asked_from_mapping(composed)), touched_with_digest(touched)
    asked = with_files(asked) if CHOICE in touched else asked
    moved, others = with_files_at(stored, of_files), touched - of_files.keys()
    changes = (*compare(stored, moved, of_files), *compare(moved, asked, others))
    refuse_identity_changes(paths, changes, typed)
    config = overlay(moved, asked, others)
    assert not any(change.verdict == "refused" for change in compare(moved, config, roles_by_key()))
    if "paths.cache" in touched:
        config = replace(config, paths=replace(config.paths, cache=asked.paths.cache))
    key = RunKey(
        model=config.model.name,
        config_hash=record.config_hash,
        code_id=code_id(PACKAGE_DIR),
        variant=record.variant,
    )
    return Target(paths=paths, key=key, config=config, record=record, changes=changes)


def refuse_older(paths: RunPaths, at: str | None) -> None:
    """A resume goes on from the newest checkpoint; an older one makes another run. Raises RefusedError."""
    if at in (None, "latest"):
        return
    reader = CheckpointReader(paths.checkpoints)
    step = reader.resolve(at)
    latest = max([step, *(info.step for info in reader.infos())])  # a newer one that cannot be read goes to quarantine
    if step == latest:
        return
    told = f"{paths.directory}@{at}: not the newest checkpoint, which is that of step {latest}"
    whole = whole_steps(reader)
    forks = [train_command(override("fork", f"{paths.directory}@{at}"))]
    if step not in whole:
        told += ", and only a part of it was kept"
        forks = [train_command(override("fork", f"{paths.directory}@{one}")) for one in nearest(whole, step)]
    if not forks:
        raise RefusedError(f"{told}. No whole checkpoint is left to go on from")
    raise RefusedError(f"{told}. Going on from an older one makes another run: `{'` or `'.join(forks)}`")


def without_stop(config: Config) -> Config:
    """The settings of a run without the place where its first attempt was told to stop: a later one goes on."""
    return replace(config, train=replace(config.train, stop_after_steps=None, stop_after_epochs=None))


def refuse_identity_changes(
    paths: RunPaths, changes: Collection[Change], typed: Sequence[str] = (), *, is_given: bool = False
) -> None:
    """Raise RefusedError, with a table, when the settings are those of another run than the one that is there.

    `is_given`: the directory is that of DINO_EXP_RUN_DIR, where nothing else can begin.
    """
    if not any(change.verdict == "refused" for change in changes):
        return
    words = [word for word in typed if key_of(word) not in ("resume", "fork")]
    aside = f"env -u {RUN_DIR_VARIABLE} " if is_given else ""
    lines = [f"  {aside}{train_command(*(words if is_given else words_with(paths, words)))}   # from nothing"]
    step = _step_to_fork(paths, changes)
    if step is not None:
        fork = train_command(override("fork", f"{paths.directory}@{step}"), *words)
        lines.insert(0, f"  {aside}{fork}   # from its step {step}")
    raise RefusedError(
        f"these settings make another run than {paths.directory}:\n{changes_text(changes)}\n"
        "leave them out to continue this run, or make a new one:\n" + "\n".join(lines)
    )


def _step_to_fork(paths: RunPaths, changes: Collection[Change]) -> int | None:
    """The newest checkpoint of a run from which one with these changes could begin; None where there is none.

    A fork begins with the state of its parent: not with a file of weights, nor with what that state does not fit.
    """
    if any(
        change.verdict == "refused" and (change.key in KEPT or change.key.startswith("init.")) for change in changes
    ):
        return None
    with contextlib.suppress(DinoExpError, OSError):  # damage is told to whoever goes on with the run
        record = load_record(paths.run_json)
        assert record is not None
        epochs = [change.now * record.schedule.steps_per_epoch for change in changes if change.key == "train.epochs"]
        return before_horizon(paths.directory, *(epochs or [record.schedule.horizon_steps]))
    return None


def before_horizon(directory: Path, horizon: int) -> int | None:
    """The newest whole checkpoint of a run before a step; None where there is none. Raises CorruptCheckpointError."""
    steps = whole_steps(CheckpointReader(RunPaths(directory).checkpoints))
    return max((step for step in steps if step < horizon), default=None)


def changes_text(changes: Collection[Change]) -> str:
    """The changes as a table of key, was, now and verdict."""
    rows = [("setting", "was", "now", "")] + [
        (c.key, setting_text(c.was), setting_text(c.now), c.verdict) for c in changes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def stored_settings(directory: Path) -> Config:
    """The settings of an existing run. Raises as `load_stored` does, and RefusedError where a file is missing."""
    try:
        return load_stored(directory)
    except FileNotFoundError as missing:
        raise RefusedError(
            f"{missing.filename}: is missing, so the run's settings are not known; put it back from a copy, or "
            "start another run with `run.variant=<name>`"
        ) from missing


def settings_of_record(paths: RunPaths, record: RunRecord) -> Config:
    """The stored settings, which must be those that `run.json` names. Raises RefusedError."""
    stored = stored_settings(paths.directory)
    if config_hash(stored) != record.config_hash:
        raise RefusedError(
            f"{paths.directory}: config.yaml holds settings {config_hash(stored)}, run.json names "
            f"{record.config_hash}; put the file back that belongs here"
        )
    return stored


def readable_record(path: Path) -> RunRecord | None:
    """The record of some run that is looked at on the way; a damaged one is told and passed over."""
    try:
        return load_record(path)
    except DinoExpError as damage:
        log.warning("passed over: %s", damage)
        return None


def _holder(directory: Path) -> tuple[str, str] | None:
    record = readable_record(RunPaths(directory).run_json)
    return None if record is None else (record.config_hash, record.code.id)


def _begun_by_this_job(runs: Path, key: RunKey) -> Path | None:
    """The run of these settings that this job began before its scheduler restarted it, whatever its code.

    That of its newest attempt: all jobs of a torchrun without `--rdzv-id` have one name.
    """
    job = job_of(os.environ)
    if job is None or not job.restarted:
        return None
    found: list[tuple[str, Path]] = []
    for path in sorted(runs.glob("*/run.json")):
        record = readable_record(path)
        if record is None or (record.config_hash, record.variant) != (key.config_hash, key.variant):
            continue
        found += [(attempt.started_at, path.parent) for attempt in record.attempts if attempt.job == job.name]
    return max(found)[1] if found else None


def _other_code(runs: Path, key: RunKey) -> tuple[Path, ...]:
    """Runs of the same settings by other code."""
    found = []
    for directory in sorted(runs.glob(f"{key.model}-{key.config_hash.partition(':')[2][:8]}*")):
        name = parse_run_key(directory.name)
        same_variant = name is not None and name.variant == key.variant
        if same_variant and name is not None and not key.code_id.startswith(name.code_digits) and _holder(directory):
            found.append(directory)
    return tuple(found)
