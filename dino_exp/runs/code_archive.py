"""The parts of a code record that are bytes: a bounded patch, and an archive of untracked files.

Both are deterministic, so that equal code gives equal bytes and a later attempt can tell that nothing
changed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dino_exp.runs.jsontext import Json
from dino_exp.runs.redact import is_secret_file

MAX_PATCH_BYTES = 20_000_000
MAX_FILE_BYTES = 1_000_000
MAX_ARCHIVE_BYTES = 10_000_000
MAX_FILES = 2_000  # that are looked at: on a slow file system each takes time at every start
MAX_NAME_BYTES = 500_000  # of all that are listed
MAX_LISTED = 200


class BoundedBuffer(io.RawIOBase):
    """A sink that keeps at most `max_bytes` and counts the rest, so that no diff can fill the memory."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept = bytearray()

    def writable(self) -> bool:
        """Always: it is a sink."""
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Take `data`; keep it while everything so far fits."""
        self.num_bytes += len(data)
        if self.num_bytes <= self.max_bytes:
            self._kept += data
        return len(data)

    def content(self) -> bytes | None:
        """Everything written; None when it was more than `max_bytes`."""
        return bytes(self._kept) if self.num_bytes <= self.max_bytes else None


@dataclass(frozen=True, kw_only=True)
class Untracked:
    """Untracked files: the archive (None when it is empty), what is in it, and what was left out and why."""

    archive: bytes | None
    files: list[dict[str, Json]]
    left_out: list[dict[str, Json]]

    def names_left_out(self) -> list[str]:
        """The files that were left out, by path."""
        return [str(entry["path"]) for entry in self.left_out]

    def as_json(self) -> dict[str, Json]:
        """The part of `git.json` about untracked files."""
        return {
            "file": "untracked.tar.gz" if self.archive is not None else None,
            "sha256": hashlib.sha256(self.archive).hexdigest() if self.archive is not None else None,
            "files": list[Json](self.files),
            "num_left_out": len(self.left_out),
            "left_out": list[Json](self.left_out[:MAX_LISTED]),
        }


def pack_untracked(root: Path, names: Iterable[str], *, code: Collection[str] = ()) -> Untracked:
    """Archive the files `names` (POSIX paths below `root`, the most wanted first) within the caps.

    Only regular files go in: a link could lead out of the folder that it is unpacked into. Of those in `code` the
    content goes in, by whatever link: it is what was imported. What usually holds a secret stays where it is, because
    the archive is copied with the run, and runs are shared.
    """
    contents: dict[str, tuple[bytes, int]] = {}
    left_out: list[dict[str, Json]] = []
    room, name_room = MAX_ARCHIVE_BYTES, MAX_NAME_BYTES
    for number, name in enumerate(names):
        found: tuple[bytes, int] | str
        name_room -= len(os.fsencode(name))
        if number >= MAX_FILES or name_room < 0:
            found = f"too many files; at most {MAX_FILES}, of {MAX_NAME_BYTES} bytes of names"
        else:
            found = _content_or_reason(root / name, room, through_links=name in code)
        if isinstance(found, str):
            left_out.append({"path": name, "reason": found})
        else:
            contents[name], room = found, room - len(found[0])
    files: list[dict[str, Json]] = [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, (content, _) in sorted(contents.items())
    ]
    return Untracked(archive=_tar(contents) if contents else None, files=files, left_out=left_out)


def _content_or_reason(path: Path, room: int, *, through_links: bool) -> tuple[bytes, int] | str:
    """The bytes of a file and its mode, or why it is left out: it is opened only if it is small enough."""
    if is_secret_file(path.name):
        return "its name says that it may hold a secret"
    try:
        status = path.stat() if through_links else path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size > MAX_FILE_BYTES:
            return f"{status.st_size} bytes; at most {MAX_FILE_BYTES} a file"
        if status.st_size > room:
            return f"the archive is full; at most {MAX_ARCHIVE_BYTES} bytes"
        with path.open("rb") as file:
            content = file.read(status.st_size)  # no more, should it grow meanwhile
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return content, status.st_mode


def _tar(contents: Mapping[str, tuple[bytes, int]]) -> bytes:
    """A gzipped tar of `contents`: sorted, without owners, times and the name of the archive itself."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, (content, mode) in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 0
            entry.mode = 0o755 if mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
