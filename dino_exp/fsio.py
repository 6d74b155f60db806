"""The file layer: the only place that calls fsync and os.replace.

`Files` offers primitive operations, one system call or so each, so that a test can wrap it and let the n-th
operation fail, die or lose what was not synced. Everything durable in the package is built from them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, TypeAlias

from dino_exp.errors import DinoExpError

JSON: TypeAlias = Any  # None, bool, int, float, str, list or dict of these: what `json` parses to
Bytes: TypeAlias = bytes | bytearray | memoryview

MAX_JSON_VALUES = 4_000_000  # a manifest of 100,000 tensors has 2.5 million; parsed they take up to 400 MB
_MAX_WRITE_BYTES = 1 << 30  # Linux writes at most 2 GiB - 4 KiB in one call
_NUM_TOKEN_BYTES = 4  # in the name of a temporary file
_LEFTOVER_SECS = 3600.0  # no writer takes that long for one small file
_NOT_A_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR)  # what opening a link, a socket or a folder says


class DamagedFileError(DinoExpError):
    """A file on disk is not what was written: torn, flipped, hostile, or not a regular file."""

    exit_code = 4


class _Handle:
    """An open file, closed at the end of a `with`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WriteHandle(_Handle):
    """An open file that grows at its end. Nothing is durable before `sync`. Errors name the file."""

    def __init__(self, fd: int, path: Path) -> None:
        super().__init__(fd)
        self._path = path

    def write(self, data: Bytes) -> None:
        """Append all of `data` (a buffer of bytes), however many system calls it takes."""
        rest = memoryview(data).cast("B")
        with self._named():
            while rest:
                rest = rest[os.write(self._fd, rest[:_MAX_WRITE_BYTES]) :]

    def write_at(self, offset: int, data: Bytes) -> None:
        """Overwrite `data` at a byte offset inside what was already written."""
        rest = memoryview(data).cast("B")
        with self._named():
            while rest:
                done = os.pwrite(self._fd, rest[:_MAX_WRITE_BYTES], offset)
                rest, offset = rest[done:], offset + done

    def sync(self) -> None:
        """Return when the bytes and the size are on the disk."""
        with self._named():
            os.fsync(self._fd)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # the system knows a descriptor only
            error.filename = error.filename or str(self._path)
            raise


class ReadHandle(_Handle):
    """An open regular file, read at absolute offsets into buffers of the caller."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        super().__init__(fd)
        self.num_bytes = num_bytes

    def expect_all(self) -> None:
        """Tell the system that all of the file will be read, in whatever order, so that it begins now."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a hint: what cannot be read tells so when it is read
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def expect_parts(self) -> None:
        """Tell the system that parts of the file will be read, in any order, so that it reads nothing ahead."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset`; return the number of bytes read, fewer only at the file's end."""
        done = 0
        while done < len(buffer):
            num = os.preadv(self._fd, [buffer[done : done + _MAX_WRITE_BYTES]], offset + done)
            if num == 0:
                break
            done += num
        return done


class Files:
    """Primitive operations on the local file system. Errors of the system are raised as they are (OSError).

    Files are opened without following a link in the last place of the path: a run directory may come from a
    stranger, and a link in it must not lead out of it.
    """

    def mkdir(self, path: Path) -> None:
        """Make a folder (its parent exists) durably; an existing one is fine."""
        try:
            path.mkdir()
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                raise
        else:
            self.sync_dir(path.parent)

    def create(self, path: Path) -> WriteHandle:
        """Open a file that does not exist yet. Raises FileExistsError: nothing is overwritten in place."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return WriteHandle(os.open(path, flags, 0o666), path)

    def append(self, path: Path) -> WriteHandle:
        """Open a regular file for growing at its end, made if it does not exist.

        Raises DamagedFileError for a folder, a pipe or a link, OSError.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return WriteHandle(_open_regular(path, flags)[0], path)

    def open_read(self, path: Path) -> ReadHandle:
        """Open a regular file. Raises FileNotFoundError; DamagedFileError for a link, a folder or a pipe."""
        return ReadHandle(*_open_regular(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC))

    def read_bytes(self, path: Path, max_bytes: int | None = None) -> bytes:
        """All of a regular file. Raises DamagedFileError, before reading, if larger than `max_bytes`."""
        with self.open_read(path) as handle:
            if max_bytes is not None and handle.num_bytes > max_bytes:
                raise DamagedFileError(f"{path}: {handle.num_bytes} bytes, expected at most {max_bytes}")
            data = bytearray(handle.num_bytes)
            num = handle.read_into(0, memoryview(data))
        return bytes(data[:num])

    def replace(self, source: Path, target: Path) -> None:
        """Rename in one step, over what is there. Durable only after `sync_dir` of the folder(s)."""
        os.replace(source, target)  # noqa: PTH105 (the one place that says it)

    def sync_dir(self, path: Path) -> None:
        """Return when the names in this folder are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: Path) -> None:
        """Remove a name. Raises FileNotFoundError."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder. Raises FileNotFoundError, OSError where something is in it."""
        path.rmdir()

    def listdir(self, path: Path) -> list[str]:
        """Names in a folder, sorted; none when the folder does not exist."""
        try:
            return sorted(os.listdir(path))  # noqa: PTH208 (names only: a Path for each costs ten times as much)
        except FileNotFoundError:
            return []

    def size(self, path: Path) -> int | None:
        """Bytes of a regular file; None when there is no such file (a link counts as none)."""
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def free_bytes(self, path: Path) -> int:
        """Bytes that an unprivileged writer may still use on the file system of an existing path."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


def _open_regular(path: Path, flags: int) -> tuple[int, int]:
    """The descriptor and the size. `flags` are non-blocking: a pipe in the place of a file must hang nobody."""
    try:
        fd = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise DamagedFileError(f"{path}: found a link or a special file, not a regular one") from error
        raise
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise DamagedFileError(f"{path}: found a folder or a special file, not a regular one")
    return fd, status.st_size


LOCAL = Files()


def write_atomic(path: Path, data: bytes | str, files: Files = LOCAL, durable: bool = True) -> None:
    """Put a whole small file in place, over an older one: readers see the old bytes or the new ones.

    When it returns and `durable` is set, the new bytes survive a power loss; unset it for what
    is derived from other files. One writer at a time. Raises OSError, and then no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        files.unlink(temporary)  # of a writer that died
    _put(temporary, path, data, files, durable)


def write_shared(path: Path, data: bytes | str, durable: bool = True) -> None:
    """As `write_atomic`, for a file that several processes may replace at once: what came last stays.

    Each has a temporary file of its own; what a writer that died left behind goes after an hour. Raises OSError.
    """
    pattern = f".{glob.escape(path.name)}.{'[0-9a-f]' * (2 * _NUM_TOKEN_BYTES)}.tmp"
    for leftover in path.parent.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another writer was faster
            if time.time() - leftover.lstat().st_mtime > _LEFTOVER_SECS:
                LOCAL.unlink(leftover)
    _put(path.with_name(f".{path.name}.{secrets.token_hex(_NUM_TOKEN_BYTES)}.tmp"), path, data, LOCAL, durable)


def _put(temporary: Path, path: Path, data: bytes | str, files: Files, durable: bool) -> None:
    try:
        with files.create(temporary) as handle:
            handle.write(data.encode() if isinstance(data, str) else data)
            if durable:
                handle.sync()
        files.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            files.unlink(temporary)
        raise
    if durable:
        files.sync_dir(path.parent)


def make_dirs(path: Path, files: Files = LOCAL) -> None:
    """Make a folder and the missing ones above it, durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    for folder in reversed(missing):
        files.mkdir(folder)


def read_json_bounded(
    path: Path,
    *,
    max_bytes: int = 16 << 20,
    max_depth: int = 64,
    error: type[DinoExpError] = DamagedFileError,
    files: Files = LOCAL,
) -> JSON:
    """Parse a JSON file that may be hostile, in bounded memory.

    Raises `error` for anything that is not strict JSON within the bounds, FileNotFoundError, OSError.
    """
    try:
        data = files.read_bytes(path, max_bytes)
    except DamagedFileError as damage:
        raise error(str(damage)) from damage
    return parse_json(data, str(path), max_depth=max_depth, error=error)


def parse_json(data: bytes, what: str, *, max_depth: int = 64, error: type[DinoExpError] = DamagedFileError) -> JSON:
    """Strict JSON: UTF-8, no NaN or infinity, no key twice, nesting and memory bounded. Raises `error`."""
    if _may_hold_too_much(data):
        raise error(f"{what}: more than {MAX_JSON_VALUES} values, which would take memory many times its size")
    depth = json_depth(data)
    if depth > max_depth:
        raise error(f"{what}: JSON nested {depth} deep, expected at most {max_depth}")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except ValueError as problem:  # also JSONDecodeError, bad UTF-8, numbers of absurd length
        raise error(f"{what}: not strict JSON ({problem})") from problem


def _may_hold_too_much(data: bytes) -> bool:
    """Whether parsing could make far more objects than any file of ours: `[[],[],` takes 20 times its size."""
    return (
        sum(data.count(sign) for sign in (b",", b"[", b"{")) > MAX_JSON_VALUES or data.count(b'"') > 2 * MAX_JSON_VALUES
    )


def json_depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, found without parsing."""
    bare = data.replace(rb"\\", b"").replace(rb"\"", b"")  # now each quote left begins or ends a string
    outside = b"".join(bare.split(b'"')[::2])
    steps = outside.translate(_UP_OR_DOWN, delete=_NOT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b"), initial=0))  # as signed bytes: summed without a Python loop


_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_UP_OR_DOWN = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # 255 is -1 as a signed byte


def _object_without_duplicates(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _refuse_constant(text: str) -> JSON:
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value
