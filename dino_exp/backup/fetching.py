"""Carry out a restore: fetch what a backup names, check every byte, and put the run in place in one step.

Everything that comes from the target may be a stranger's. Paths were checked when the index was read; files are made
anew in a folder of ours, no more of each is read than the index says, and nothing is looked at before its digest fits.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from dino_exp.backup.courier import Progress
from dino_exp.backup.index import (
    INDEX,
    MAX_INDEX_BYTES,
    PARTIAL,
    Index,
    StoredCheckpoint,
    StoredFile,
    parse_index,
)
from dino_exp.backup.plan import LeftOut
from dino_exp.backup.source import only_one, take
from dino_exp.backup.target import GoneError, Target
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import CorruptCheckpointError, NoCheckpointError, RefusedError
from dino_exp.fsio import LOCAL, make_dirs
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """What a restore did. `bytes_skipped` were there already, from one that was interrupted."""

    run_key: str
    num_files: int
    steps: tuple[int, ...]
    bytes_fetched: int
    bytes_skipped: int
    left_out: tuple[LeftOut, ...]


def restore(target: Target, directory: Path, *, progress: Progress) -> RestoreReport:
    """Put the run of a backup into a directory that does not exist yet, or is empty.

    A file that is not what the backup says is left out, with the checkpoint that needs it. Until everything is there
    the files lie in a hidden folder beside the directory, where the same command finds them.
    Raises RefusedError where something is in the way, NoCheckpointError where there is no whole backup,
    CorruptCheckpointError where too little of it is good, LockedError, BackupError, OSError.
    """
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 (`.` has a name then, and links stay links)
    _refuse_occupied(directory)
    index = _read_index(target)
    hidden = directory.with_name(f".{directory.name}.restoring")
    building = hidden / "run"  # one deeper than a run: beside other runs, nobody takes half of one for a run
    make_dirs(hidden)
    for path in (hidden, building):  # in a folder that others may write to, such a link could lead to anything
        if path.is_symlink():
            raise RefusedError(f"{path}: a link, expected a folder that a restore has made; remove it")
    LOCAL.mkdir(building)
    with only_one(hidden, "a restore to this directory"):
        made = _Restore(target, building, index, progress).run()
        _refuse_occupied(directory)
        LOCAL.replace(building, directory)
        LOCAL.sync_dir(directory.parent)
        hidden.rmdir()
    return made


def _refuse_occupied(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()) or LOCAL.listdir(directory):
        raise RefusedError(
            f"{directory}: something is there already, expected a directory that does not exist, or is empty. "
            "Nothing is written over a run: restore to another directory"
        )
    # The run is made beside the directory and takes its place by one rename, which these two would not stand.
    if directory.is_mount() or (directory.is_dir() and Path.cwd().is_relative_to(directory.resolve())):
        what = "where a file system is mounted" if directory.is_mount() else "the current directory, or one around it"
        raise RefusedError(f"{directory}: {what}; restore to a new directory, such as {directory / 'run'}")


def _read_index(target: Target) -> Index:
    try:
        data = target.read_small(INDEX, MAX_INDEX_BYTES)
    except GoneError:
        with contextlib.suppress(GoneError):
            target.look_at(PARTIAL)
            raise NoCheckpointError(
                f"{target.shown}: a backup was begun here and did not come to its end. The same command goes on with "
                f"it: dino-exp checkpoints backup <run> {shlex.quote(target.shown)}"
            ) from None
        raise NoCheckpointError(
            f"{target.shown}: no {INDEX}, so no backup is here; expected the address that was given to "
            "`dino-exp checkpoints backup`"
        ) from None
    return parse_index(data, f"{target.shown}/{INDEX}")


class _Restore:
    """One restore into the folder `building`: what was fetched so far."""

    def __init__(self, target: Target, building: Path, index: Index, progress: Progress) -> None:
        self._target, self._building, self._index, self._progress = target, building, index, progress
        self._files = {file.path: file for file in index.all_files()}
        self._folders = {str(parent) for path in self._files for parent in PurePosixPath(path).parents} - {"."}
        self._problems: dict[str, str | None] = {}  # of each path that was tried; None: it is there
        self._bytes_fetched = self._bytes_skipped = 0

    def run(self) -> RestoreReport:
        """Everything, in order."""
        self._remove_strangers()
        self._refuse_without_room()
        self._progress.expect(2 * sum(file.bytes for file in self._files.values()))
        for folder in sorted(self._folders):
            LOCAL.mkdir(self._building / folder)
        left_out = [
            LeftOut(file=file.path, reason=problem, damaged=True)
            for file in self._index.files
            if (problem := self._fetch(file)) is not None
        ]
        steps = []
        for checkpoint in self._index.checkpoints:
            problem = self._fetch_checkpoint(checkpoint)
            if problem is None:
                steps.append(checkpoint.step)
            else:
                left_out.append(LeftOut(step=checkpoint.step, reason=problem, damaged=True))
        self._check(steps, left_out)
        for folder in ("", *self._folders):
            LOCAL.sync_dir(self._building / folder)
        return RestoreReport(
            run_key=self._index.run_key,
            num_files=sum(problem is None for problem in self._problems.values()),
            steps=tuple(steps),
            bytes_fetched=self._bytes_fetched,
            bytes_skipped=self._bytes_skipped,
            left_out=tuple(left_out),
        )

    def _remove_strangers(self) -> None:
        """Remove what an interrupted restore of another version of the backup has left."""
        for folder, folders, files in os.walk(self._building, topdown=False):
            for name in [*files, *folders]:
                path = Path(folder, name)
                relative = path.relative_to(self._building).as_posix()
                if path.is_dir() and not path.is_symlink():
                    if relative not in self._folders:
                        path.rmdir()
                elif relative not in self._files:
                    LOCAL.unlink(path)

    def _refuse_without_room(self) -> None:
        there = sum(LOCAL.size(self._building / path) or 0 for path in self._files)
        needed = sum(file.bytes for file in self._files.values()) - there
        free = LOCAL.free_bytes(self._building)
        if needed > free:
            raise RefusedError(
                f"{self._building.parent}: has {free / 1e6:,.1f} MB free, the backup needs {needed / 1e6:,.1f} MB; "
                "nothing was fetched"
            )

    def _fetch_checkpoint(self, checkpoint: StoredCheckpoint) -> str | None:
        """Packs first: a manifest is there only with all that it names. The problem, None where there is none."""
        for file in checkpoint.files:
            problem = self._fetch(file)
            if problem is not None:
                return problem
        return None

    def _fetch(self, file: StoredFile) -> str | None:
        """Bring one file here, as it should be; what is wrong with it, None where nothing is."""
        if file.path not in self._problems:
            self._problems[file.path] = self._fetch_new(file)
        return self._problems[file.path]

    def _fetch_new(self, file: StoredFile) -> str | None:
        path = self._building / file.path
        if LOCAL.size(path) == file.bytes:
            with take(path) as taken:
                if (taken.num_bytes, taken.sha256()) == (file.bytes, file.sha256):
                    self._bytes_skipped += file.bytes
                    self._progress.heard(file.bytes)
                    return None
        try:
            found = self._target.read(file.stored, partial(self._write, path, file.bytes))
        except GoneError:
            return f"{file.stored} is missing at the target"
        if found != file.sha256:
            _remove(path)
            return f"{file.stored} was changed at the target: its content is not what the backup says"
        self._bytes_fetched += file.bytes
        return None

    def _write(self, path: Path, num_bytes: int, blocks: Iterator[bytes]) -> str:
        """Write a file anew, and return the digest of what came; of a longer one no more than shows that it is."""
        _remove(path)
        hasher, done = hashlib.sha256(), 0
        with LOCAL.create(path) as handle:
            for block in blocks:
                hasher.update(block)
                done += len(block)
                if done > num_bytes:
                    break
                handle.write(block)
                self._progress.heard(len(block))
            handle.sync()
        return hasher.hexdigest()

    def _check(self, steps: list[int], left_out: list[LeftOut]) -> None:
        """Look at what was fetched as a run: its record, and every byte of its checkpoints by their own digests."""
        shown = self._target.shown
        what = "; ".join(item.reason for item in left_out[:3])
        again = f"dino-exp checkpoints backup <run> {shlex.quote(shown)} --reread"
        mend = f"To mend it from the run, if that is still there: {again}"
        record = load_record(RunPaths(self._building).run_json)
        if record is None or record.run_key != self._index.run_key:
            raise CorruptCheckpointError(
                f"{shown}: no run.json of {self._index.run_key} in this backup. {what}. {mend}"
            )
        if self._index.checkpoints and not steps:
            raise CorruptCheckpointError(f"{shown}: no checkpoint of this backup is good. {what}. {mend}")
        done = 0

        def heard(now: int, _: int) -> None:
            nonlocal done
            self._progress.heard(now - done)
            done = now

        reader = CheckpointReader(RunPaths(self._building).checkpoints)
        damaged = reader.verify(progress=heard)["damaged"]
        if damaged or reader.steps() != steps:
            place = damaged[0] if damaged else {"step": None, "reason": f"steps {reader.steps()}, expected {steps}"}
            raise CorruptCheckpointError(
                f"{shown}: the files are those that were sent, and step {place['step']} in them is damaged: "
                f"{place['reason']}. Nothing was put in place"
            )


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        LOCAL.unlink(path)
