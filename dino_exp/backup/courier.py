"""Brings single files to the target, and knows for each what surely lies there: sent or found, and read back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

from dino_exp.backup.index import MAX_INDEX_BYTES, Index, StoredFile, index_to_bytes, parse_index, stored_path
from dino_exp.backup.plan import Remote, take_stock
from dino_exp.backup.source import take
from dino_exp.backup.target import GoneError, Target
from dino_exp.errors import BackupError

_NUM_TRIES = 3  # of a file that changes while it is copied


class Progress(Protocol):
    """Hears of the work ahead and of the work done, in bytes: each is checked, sent and read back."""

    def expect(self, num_bytes: int) -> None:
        """So many more are to come."""

    def heard(self, num_bytes: int) -> None:
        """So many more are done."""


class Courier:
    """Carries files of one run to one target. `good`: what is there as it should be, by where it lies.

    `bytes_sent` counts everything that was written there, `content_sent` the run's files alone.
    """

    def __init__(self, run: Path, target: Target, progress: Progress) -> None:
        self._run, self.target, self._progress = run, target, progress
        self.there: dict[str, Remote] = {}
        self.good: dict[str, StoredFile] = {}
        self.bytes_sent = self.content_sent = 0

    def read_index(self, path: str) -> Index | None:
        """An index that lies at the target; None where there is none.

        Raises CorruptCheckpointError, UnsupportedFormatError, BackupError.
        """
        try:
            data = self.target.read_small(path, MAX_INDEX_BYTES)
        except GoneError:
            return None
        return parse_index(data, f"{self.target.shown}/{path}")

    def put_index(self, path: str, index: Index) -> None:
        """Write an index and read it back. Raises BackupError."""
        data = index_to_bytes(index)
        if len(data) > MAX_INDEX_BYTES:
            raise BackupError(f"{path}: would have {len(data)} bytes, expected at most {MAX_INDEX_BYTES}")
        self.target.replace(path, data)
        self.bytes_sent += len(data)
        self.there[path] = Remote(len(data), "")
        if self.target.read_small(path, MAX_INDEX_BYTES) != data:
            raise BackupError(
                f"{self.target.shown}/{path}: not what was sent; is another backup under way? "
                "The same command finds out what is there and goes on"
            )

    def look(self) -> None:
        """List what is there: after the indexes were read, or it may lack what they name."""
        self.there = self.target.listing()

    def check(self, files: dict[str, StoredFile], *, reread: bool) -> dict[str, str]:
        """Find out which files at the target are as they were; what ails each of the others.

        Those that were written anew since they were read back are read again; with `reread` all are.
        """
        stock = take_stock(files, self.there)
        doubtful = {**stock.good, **stock.doubtful} if reread else stock.doubtful
        self.good.update({} if reread else stock.good)
        self._progress.expect(sum(file.bytes for file in doubtful.values()))
        bad = dict(stock.bad)
        for stored, file in doubtful.items():
            if not self._is_there(file.path, file.bytes, file.sha256):
                bad[stored] = "was changed"
        return bad

    def bring(self, path: str) -> StoredFile:
        """One file of the run, surely at the target: sent and read back, unless it is there already.

        Raises FileNotFoundError, DamagedFileError, OSError for what is wrong here, BackupError for what is there.
        """
        for _ in range(_NUM_TRIES):
            with take(self._run / path) as taken:
                num_bytes, sha256 = taken.num_bytes, taken.sha256()
                stored = stored_path(path, sha256)
                if stored in self.good or self._was_left_there(path, num_bytes, sha256):
                    return self.good[stored]
                self.target.send(stored, partial(self._told, taken.blocks))
            self.bytes_sent += num_bytes
            self.content_sent += num_bytes
            if self._is_there(path, num_bytes, sha256):
                return self.good[stored]
            # The file was cut while it was read, or the target is not to be trusted.
        raise BackupError(
            f"{self.target.shown}: {stored} is not what was sent when it is read back, {_NUM_TRIES} times over"
        )

    def _was_left_there(self, path: str, num_bytes: int, sha256: str) -> bool:
        """Whether a backup that did not come to its end has sent this file."""
        found = self.there.get(stored_path(path, sha256))
        return found is not None and found.bytes == num_bytes and self._is_there(path, num_bytes, sha256)

    def _is_there(self, path: str, num_bytes: int, sha256: str) -> bool:
        """Read a file back, and note it as good if it is what it should be."""
        stored = stored_path(path, sha256)
        try:
            remote = self.target.look_at(stored)
            found = self.target.read(stored, partial(_digest, num_bytes, self._progress.heard))
        except GoneError:
            return False
        if found != sha256:
            return False
        self.there[stored] = remote
        self.good[stored] = StoredFile(path=path, bytes=num_bytes, sha256=sha256, stamp=remote.stamp)
        return True

    def _told(self, blocks: Callable[[], Iterator[bytes]]) -> Iterator[bytes]:
        for block in blocks():
            yield block
            self._progress.heard(len(block))


def _digest(num_bytes: int, heard: Callable[[int], None], blocks: Iterator[bytes]) -> str:
    """The digest of a file of `num_bytes`; of a longer one no more is read than shows that it is longer."""
    hasher, done = hashlib.sha256(), 0
    for block in blocks:
        hasher.update(block)
        done += len(block)
        heard(len(block))
        if done > num_bytes:
            break
    return hasher.hexdigest()
