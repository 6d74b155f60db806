"""The parts of a code record that are bytes: a bounded patch, and an archive of untracked files.

Both are deterministic, so that equal code gives equal bytes and a later attempt can tell that nothing
changed.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dino_exp.runs.jsontext import Json

MAX_PATCH_BYTES = 20_000_000
MAX_FILE_BYTES = 1_000_000
MAX_ARCHIVE_BYTES = 10_000_000
MAX_LISTED = 200
# An untracked file is copied into every run, and runs are shared: what usually holds a secret stays where it
# is.
_SECRET_FILE = re.compile(
    r"\.env(?:\..*)?|\.netrc|\.pypirc|\.npmrc|id_(?:rsa|dsa|ecdsa|ed25519)|.*\.(?:pem|key|p12|pfx|kdbx|keystore)"
    r"|.*(?:credential|secret|password|token)s?(?:\..*)?",
    re.IGNORECASE,
)


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

    def as_json(self) -> dict[str, Json]:
        """The part of `git.json` about untracked files."""
        return {
            "file": "untracked.tar.gz" if self.archive is not None else None,
            "sha256": hashlib.sha256(self.archive).hexdigest() if self.archive is not None else None,
            "files": list[Json](self.files),
            "num_left_out": len(self.left_out),
            "left_out": list[Json](self.left_out[:MAX_LISTED]),
        }


def pack_untracked(root: Path, names: Iterable[str]) -> Untracked:
    """Archive the files `names` (POSIX paths below `root`, the most wanted first) within the caps.

    Only regular files go in: a link could lead out of the folder that it is unpacked into.
    """
    contents: dict[str, bytes] = {}
    left_out: list[dict[str, Json]] = []
    room = MAX_ARCHIVE_BYTES
    for name in names:
        content = _content_or_reason(root / name, name, room)
        if isinstance(content, str):
            left_out.append({"path": name, "reason": content})
        else:
            contents[name], room = content, room - len(content)
    files: list[dict[str, Json]] = [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(contents.items())
    ]
    return Untracked(archive=_tar(root, contents) if contents else None, files=files, left_out=left_out)


def _content_or_reason(path: Path, name: str, room: int) -> bytes | str:
    if _SECRET_FILE.fullmatch(path.name):
        return "its name says that it may hold a secret"
    try:
        if path.is_symlink() or not path.is_file():
            return "not a regular file"
        num_bytes = path.stat().st_size
        if num_bytes > MAX_FILE_BYTES:
            return f"{num_bytes} bytes; at most {MAX_FILE_BYTES} a file"
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if len(content) > room:
        return f"the archive is full; at most {MAX_ARCHIVE_BYTES} bytes"
    return content


def _tar(root: Path, contents: dict[str, bytes]) -> bytes:
    """A gzipped tar of `contents`: sorted, without owners, times and the name of the archive itself."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for name, content in sorted(contents.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 0
            entry.mode = 0o755 if (root / name).stat().st_mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
