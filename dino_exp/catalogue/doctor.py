"""What is wrong with an outputs folder and the program around it, and the command that mends it. Only looks."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, TypeAlias

from dino_exp.catalogue import database
from dino_exp.catalogue.database import FILE_NAME
from dino_exp.catalogue.entry import RUNS
from dino_exp.checkpoint.layout import is_leftover
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.registry import missing_packs, read_index
from dino_exp.checkpoint.store import Store
from dino_exp.config.stored import load_stored
from dino_exp.config.typed import override, train_command
from dino_exp.errors import DinoExpError, RefusedError
from dino_exp.fsio import LOCAL
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import probe
from dino_exp.runs.record import RunRecord, load_record

Level: TypeAlias = Literal["fine", "note", "problem"]

LOW_DISK_BYTES = 2_000_000_000
_PAIRS = {"1.3": "2.3", "1.4": "2.4"}  # of hydra-core: the omegaconf that it goes with


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at: `note` for what mends itself, `problem` for what somebody must see to."""

    level: Level
    about: str
    says: str
    command: str | None = None


def examine(outputs: Path) -> Iterator[Finding]:
    """Everything that can be said without reading packs (`checkpoints verify --all` does that)."""
    yield from _program()
    yield from _place(outputs)
    yield from _catalogue(outputs)
    for folder in sorted(path for path in (outputs / RUNS).glob("*") if path.is_dir()):
        yield from _run(folder)


def _program() -> Iterator[Finding]:
    hydra, omegaconf = metadata.version("hydra-core"), metadata.version("omegaconf")
    wanted = _PAIRS.get(".".join(hydra.split(".")[:2]))
    python = ".".join(map(str, sys.version_info[:3]))
    versions = f"Python {python}, torch {metadata.version('torch')}, hydra-core {hydra}, omegaconf {omegaconf}"
    if wanted is None or not omegaconf.startswith(wanted):
        pairs = " or ".join(f"{one} with {other}" for one, other in _PAIRS.items())
        yield Finding(
            level="problem",
            about="versions",
            says=f"{versions}; expected hydra-core and omegaconf of {pairs}",
            command="pip install 'hydra-core==1.3.*' 'omegaconf==2.3.*'",
        )
    else:
        yield Finding(level="fine", about="versions", says=versions)
    with contextlib.suppress(metadata.PackageNotFoundError):
        optuna = metadata.version("hydra-optuna-sweeper")
        if optuna.startswith("1.3."):
            yield Finding(
                level="note",
                about="versions",
                says=f"hydra-optuna-sweeper {optuna} keeps a study in memory only; storage=sqlite: ends in an error",
                command="pip install --pre 'hydra-optuna-sweeper>=1.4.0rc3'",
            )
    if shutil.which("git") is None:
        yield Finding(
            level="note", about="git", says="not found: runs record their code_id, but no commit and no patch"
        )
    else:
        yield Finding(level="fine", about="git", says="found")


def _place(outputs: Path) -> Iterator[Finding]:
    if outputs.exists() and not outputs.is_dir():
        says, again = "a file, expected the folder that holds `runs/`", "dino-exp runs doctor --outputs <folder>"
        yield Finding(level="problem", about=str(outputs), says=says, command=again)
        return
    if not outputs.is_dir():
        yield Finding(level="note", about=str(outputs), says="no such folder yet", command="python -m dino_exp.train")
        return
    free = LOCAL.free_bytes(outputs)
    low = free < LOW_DISK_BYTES
    command = (
        f"dino-exp checkpoints prune <run> --keep-last 1 --dry-run --outputs {shlex.quote(str(outputs))}"
        if low
        else None
    )
    level: Level = "problem" if low else "fine"
    yield Finding(level=level, about="disk", says=f"{free / 1e9:.1f} GB free in {outputs}", command=command)


def _catalogue(outputs: Path) -> Iterator[Finding]:
    path = outputs / FILE_NAME
    found = database.damage(path)
    if found is not None:
        command = f"dino-exp runs rebuild --outputs {shlex.quote(str(outputs))}"
        yield Finding(level="problem", about=FILE_NAME, says=f"cannot be used: {found}", command=command)
    elif path.is_file():
        yield Finding(level="fine", about=FILE_NAME, says="can be read")


def _run(folder: Path) -> Iterator[Finding]:
    paths = RunPaths(folder)
    try:
        record = load_record(paths.run_json)
    except (DinoExpError, OSError) as problem:
        command = (
            None if isinstance(problem, RefusedError) else _get_back(paths)
        )  # refused: of a newer version, and whole
        yield Finding(level="problem", about=folder.name, says=str(problem), command=command)
        return
    if record is None:
        yield from _without_record(paths)
        return
    yield from _settings(paths)
    yield from _owner(paths, record)
    yield from _checkpoints(paths)
    if record.failed_save is not None:
        says = f"step {record.failed_save.step} was not saved: {record.failed_save.error}"
        yield Finding(level="problem", about=folder.name, says=says, command=_resume(paths))


def _without_record(paths: RunPaths) -> Iterator[Finding]:
    folder = paths.directory
    if any(paths.checkpoints.glob("step-*.json")):
        says = "holds checkpoints and no run.json, so nobody knows whose they are; put run.json back from a copy"
        yield Finding(level="problem", about=folder.name, says=says, command=_get_back(paths))
    else:
        how = f"failed at once (traceback in {paths.failed})" if paths.failed.is_file() else "was begun and killed"
        says = f"{how} before there was anything; the same command begins it again, or remove it"
        yield Finding(level="note", about=folder.name, says=says)


def _settings(paths: RunPaths) -> Iterator[Finding]:
    try:
        load_stored(paths.directory)
    except (DinoExpError, OSError) as problem:
        says = str(problem).splitlines()[0]
        yield Finding(level="problem", about=paths.directory.name, says=says, command=_get_back(paths))


def _get_back(paths: RunPaths) -> str:
    """The command that makes a whole run of its backup, beside the one that is not: nothing else knows these files."""
    return f"dino-exp checkpoints restore <backup> {shlex.quote(f'{paths.directory}-restored')}"


def _owner(paths: RunPaths, record: RunRecord) -> Iterator[Finding]:
    if record.state != "running":
        return
    try:
        owner = probe(paths, clock=time.time)
    except DinoExpError as problem:
        yield Finding(level="problem", about=paths.directory.name, says=str(problem))
        return
    if owner is None:
        says = f"was killed at step {record.step} of {record.schedule.horizon_steps}"
        yield Finding(level="note", about=paths.directory.name, says=says, command=_resume(paths))


def _checkpoints(paths: RunPaths) -> Iterator[Finding]:
    store, name = Store(paths.checkpoints), paths.directory.name
    verify = f"dino-exp checkpoints verify {shlex.quote(str(paths.directory))}"
    try:
        store.refuse_links()
        index = read_index(store)
        load_pins(store.folder)
    except (DinoExpError, OSError) as problem:
        yield Finding(level="problem", about=name, says=str(problem), command=verify)
        return
    for step, why in index.damaged.items():
        yield Finding(level="problem", about=f"{name}@{step}", says=why, command=verify)
    for step, row in index.rows.items():
        missing = missing_packs(store, row)
        if missing is not None:
            yield Finding(level="problem", about=f"{name}@{step}", says=missing, command=verify)
    reached = {pack for row in index.rows.values() for pack in row.packs}
    packs = [pack for pack in store.packs() if pack not in reached]
    left = [file for file in LOCAL.listdir(store.folder) if is_leftover(file)]
    if not index.damaged and (packs or left):
        num = len(packs) + len(left)
        says = f"{num} leftovers of a process that died, or of one at work; the next attempt sweeps them"
        yield Finding(level="note", about=name, says=says)


def _resume(paths: RunPaths) -> str:
    return train_command(override("resume", paths.directory))
