"""A file that grows by whole lines of JSON, and that a killed writer or a full disk leaves readable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dino_exp.fsio import LOCAL, DamagedFileError, ReadHandle, parse_json
from dino_exp.runs.jsontext import Json, one_line

_BLOCK_BYTES = 1 << 16
_MAX_LINE_BYTES = 16 << 20
_MAX_LINE_DEPTH = 32


class JsonLines:
    """An open file of JSON lines. One writer; readers may read meanwhile."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        """Open `path` for growing, made if it does not exist, and cut it to `num_bytes`. Raises OSError."""
        self.path, self.num_bytes = path, num_bytes
        is_new = LOCAL.size(path) is None
        self._handle = LOCAL.append(path)
        cut(path, num_bytes)
        if is_new:
            LOCAL.sync_dir(path.parent)

    def append(self, value: object) -> None:
        """Write one line. On an OSError (a full disk) what was written of it is taken back first."""
        line = one_line(value).encode() + b"\n"
        try:
            self._handle.write(line)
        except OSError:
            cut(self.path, self.num_bytes)
            raise
        self.num_bytes += len(line)

    def sync(self) -> None:
        """Return when every line is on the disk."""
        self._handle.sync()

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        self._handle.close()


def cut(path: Path, num_bytes: int) -> None:
    """Take away what lies beyond `num_bytes`. A link in the place of the file is not followed (OSError)."""
    fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size > num_bytes:
            os.ftruncate(fd, num_bytes)
    finally:
        os.close(fd)


def whole_lines_bytes(path: Path) -> int:
    """Bytes up to and with the last line feed: a torn last line does not count. 0 when there is no file."""
    try:
        handle = LOCAL.open_read(path)
    except FileNotFoundError:
        return 0
    with handle:
        end = handle.num_bytes
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            found = _read(handle, start, end).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def last_line(path: Path) -> bytes | None:
    """The last whole line, without its line feed; None where there is none, or one that is too long. Raises OSError."""
    start, tail = whole_lines_bytes(path) - 1, b""
    if start < 0:
        return None
    with LOCAL.open_read(path) as handle:
        while start > 0 and len(tail) <= _MAX_LINE_BYTES:
            end, start = start, max(0, start - _BLOCK_BYTES)
            _, found, line = _read(handle, start, end).rpartition(b"\n")
            tail = line + tail
            if found:
                return tail
    return tail if start == 0 else None


def count_lines(path: Path, num_bytes: int) -> tuple[int, bool]:
    """Line feeds in the first `num_bytes` of a file that is as long, and whether the last byte is one."""
    num_lines, last = 0, b"\n"
    with LOCAL.open_read(path) as handle:
        for start in range(0, num_bytes, _BLOCK_BYTES):
            block = _read(handle, start, min(num_bytes, start + _BLOCK_BYTES))
            num_lines, last = num_lines + block.count(b"\n"), block[-1:]
    return num_lines, last == b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Json]]:
    """The objects of a file of JSON lines, in order; a torn last line is left out, no file is an empty one.

    Raises DamagedFileError that names the line for anything that is not one strict JSON object.
    """
    try:
        handle = LOCAL.open_read(path)
    except FileNotFoundError:
        return
    num_lines, rest = 0, b""
    with handle:
        for start in range(0, handle.num_bytes, _BLOCK_BYTES):
            *lines, rest = (rest + _read(handle, start, start + _BLOCK_BYTES)).split(b"\n")
            for line in lines:
                num_lines += 1
                yield parse_line(line, f"{path}, line {num_lines}")
            if len(rest) > _MAX_LINE_BYTES:
                raise DamagedFileError(f"{path}, line {num_lines + 1}: longer than {_MAX_LINE_BYTES} bytes")


def parse_line(line: bytes, where: str) -> dict[str, Json]:
    """One line as the strict JSON object that it must be. Raises DamagedFileError that begins with `where`."""
    value = parse_json(line, where, max_depth=_MAX_LINE_DEPTH)
    if not isinstance(value, dict):
        raise DamagedFileError(f"{where}: found {type(value).__name__}, expected an object")
    return value


def _read(handle: ReadHandle, start: int, end: int) -> bytes:
    block = bytearray(end - start)
    num_bytes = handle.read_into(start, memoryview(block))
    return bytes(block[:num_bytes])
