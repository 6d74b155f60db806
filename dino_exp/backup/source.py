"""The run's side of a backup: which of its files travel, and how one is read while the run may be writing it.

Nothing here changes the run, not even a lock file: the lock of a backup is on the folder itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dino_exp.backup.index import CHECKPOINTS, MAX_FILES, PINS_PATH, path_problem
from dino_exp.backup.plan import LeftOut
from dino_exp.errors import CheckpointError, CorruptCheckpointError, LockedError
from dino_exp.fsio import LOCAL, ReadHandle
from dino_exp.runs.jsonl import whole_lines_bytes
from dino_exp.runs.record import RunRecord

_BLOCK_BYTES = 4 << 20
_LINES = ".jsonl"


@contextlib.contextmanager
def only_one(folder: Path, doing: str) -> Iterator[None]:
    """Be the only backup or restore at work on a folder; trainings are not kept out, and not disturbed.

    Raises LockedError when there is another, CheckpointError where the file system cannot lock, OSError.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(f"{folder}: {doing} is under way in another process; nothing was done") from error
        except OSError as error:
            raise CheckpointError(f"{folder}: this file system cannot lock ({error.strerror})") from error
        yield
    finally:
        os.close(fd)


def attempts_of(record: RunRecord) -> tuple[str, ...]:
    """What tells each attempt of the run from those of any other copy of it."""
    return tuple(f"{attempt.started_at} {attempt.host} {attempt.pid}" for attempt in record.attempts)


def other_files(run: Path) -> tuple[list[str], list[LeftOut]]:
    """The paths of what travels beside the checkpoints, and what does not, and why: everything that is there.

    Left out without a word are the locks of this machine and what dead writers left. Of `checkpoints/` only the pins
    travel: the registry is made again, and what is in quarantine is damaged. Links are not followed.
    Raises CorruptCheckpointError for more files than a backup may have, OSError.
    """
    paths: list[str] = []
    left_out: list[LeftOut] = []
    for path, entry in _walk(run, ""):
        problem = path_problem(path)
        if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
            problem = "a link or a special file, not a regular one"
        if problem is None and entry.is_file(follow_symlinks=False):
            paths.append(path)
        elif problem is not None and not _goes_without_saying(path):
            left_out.append(LeftOut(file=path, reason=problem))
        if len(paths) + len(left_out) > MAX_FILES:
            raise CorruptCheckpointError(f"{run}: more than {MAX_FILES} files beside its checkpoints, expected a run")
    if LOCAL.size(run / PINS_PATH) is not None:
        paths.append(PINS_PATH)
    return paths, left_out


@dataclass(frozen=True)
class Taken:
    """An open file of which the first `num_bytes` are copied: a log grows meanwhile, and a row of it may be torn."""

    handle: ReadHandle
    num_bytes: int

    def blocks(self) -> Iterator[bytes]:
        """The bytes. Raises OSError. Fewer than `num_bytes` if the file was cut meanwhile."""
        for start in range(0, self.num_bytes, _BLOCK_BYTES):
            block = bytearray(min(_BLOCK_BYTES, self.num_bytes - start))
            done = self.handle.read_into(start, memoryview(block))
            yield bytes(block[:done])

    def sha256(self) -> str:
        """The digest of the bytes. Raises OSError."""
        hasher = hashlib.sha256()
        for block in self.blocks():
            hasher.update(block)
        return hasher.hexdigest()


@contextlib.contextmanager
def take(path: Path) -> Iterator[Taken]:
    """Open a file of a run for copying. Raises FileNotFoundError, DamagedFileError for a link, OSError."""
    with LOCAL.open_read(path) as handle:
        num_bytes = handle.num_bytes
        if path.suffix == _LINES:
            num_bytes = min(num_bytes, whole_lines_bytes(path))
        yield Taken(handle, num_bytes)


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every entry below a folder but those of the checkpoints, by its path from there, in a fixed order."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = prefix + entry.name
        if path == CHECKPOINTS and entry.is_dir(follow_symlinks=False):
            continue
        yield path, entry
        if entry.is_dir(follow_symlinks=False) and path_problem(path) is None:
            yield from _walk(Path(entry.path), f"{path}/")


def _goes_without_saying(path: str) -> bool:
    name = path.rpartition("/")[2]
    return path in ("lock", "owner.json") or (name.startswith(".") and name.endswith(".tmp"))
