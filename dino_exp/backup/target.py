"""The place of a backup: a folder that fsspec can reach, asked again where it fails in passing.

The only module that knows fsspec. Credentials are the backend's own business: none are taken, kept or shown here.
"""

from __future__ import annotations

import contextlib
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from dino_exp.backup.patience import Patience, is_passing, lacks_credentials
from dino_exp.backup.plan import Remote
from dino_exp.errors import BackupError, CorruptCheckpointError, UsageError
from dino_exp.fsio import LOCAL, make_dirs, write_atomic
from dino_exp.runs.redact import MASK, strip_credentials
from dino_exp.waiting import within

T = TypeVar("T")

BLOCK_BYTES = 8 << 20
_MAX_TEXT = 400  # of a backend's message
# Stores without folders. There a "folder" is made by making a bucket, which is not ours to make.
_NO_FOLDERS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"})
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "ssh": "ssh", "sftp": "ssh"}
# What tells one version of a file from the next, the surest first.
_STAMPS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "created")


class GoneError(BackupError):
    """There is no such file at the target."""

    exit_code = 4


class _TroubleError(Exception):
    """An error of the backend, told apart from those of the files here."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Target:
    """Files below one address, by their paths. `say` hears of every failure that is not the last.

    Every method raises BackupError, with the address as it may be shown, once the tries are used up or at once where
    trying again is of no use. Memory: a few blocks, and the buffer of the backend (50 MB on S3).
    """

    def __init__(
        self,
        url: str,
        *,
        say: Callable[[str], None],
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Reach the address. Raises UsageError for one that nothing here can open."""
        self.shown = strip_credentials(url)
        self._secret = _user_info(url)
        self._patience = patience or Patience()
        self._say, self._sleep = say, sleep
        self._draw = random.Random().random  # of no seed: two clients must not draw alike
        self._made: set[str] = set()
        if not url.partition("://")[2 if "://" in url else 0].strip(" /"):
            raise UsageError(
                f"{self.shown!r}: names no place, expected a folder, s3://bucket/run or the like; "
                "is a variable empty in the command?"
            )
        if "::" in url:
            raise UsageError(f"{self.shown}: found a chain of addresses, expected one, such as s3://bucket/run")
        self._fs, self._root = self._insist("open it", lambda: self._open(url))

    @property
    def local_folder(self) -> Path | None:
        """The folder on this machine that it is, None where it is none."""
        from fsspec.implementations.local import LocalFileSystem

        return Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def listing(self) -> dict[str, Remote]:
        """Every file below the address."""

        def work() -> dict[str, dict[str, Any]]:
            self._fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
            return found

        found = self._insist("list it", lambda: self._call(work))
        begin = self._root.rstrip("/") + "/"
        return {
            name.removeprefix(begin): _remote(info)
            for name, info in found.items()
            if name.startswith(begin) and info["type"] == "file"
        }

    def look_at(self, path: str) -> Remote:
        """What the target says of one file now. Raises GoneError."""

        def work() -> dict[str, Any]:
            self._fs.invalidate_cache()
            found: dict[str, Any] = self._fs.info(self._full(path))
            return found

        return _remote(self._insist(f"look at {path}", lambda: self._call(work), gone=path))

    def read(self, path: str, consume: Callable[[Iterator[bytes]], T]) -> T:
        """What `consume` makes of a file's blocks; called anew, with a new stream, when reading fails. GoneError."""

        def work() -> T:
            handle = self._call(lambda: self._fs.open(self._full(path), "rb"))
            try:
                return consume(self._blocks(handle))
            finally:
                with contextlib.suppress(_TroubleError):  # everything that was wanted of it was read
                    self._call(handle.close)

        return self._insist(f"read {path}", work, gone=path)

    def read_small(self, path: str, max_bytes: int) -> bytes:
        """A whole file. Raises GoneError, CorruptCheckpointError when it is larger than it can be."""

        def consume(blocks: Iterator[bytes]) -> bytes:
            data = bytearray()
            for block in blocks:
                data += block
                if len(data) > max_bytes:
                    raise CorruptCheckpointError(f"{self.shown}/{path}: more than {max_bytes} bytes, which is not ours")
            return bytes(data)

        return self.read(path, consume)

    def send(self, path: str, blocks: Callable[[], Iterable[bytes]]) -> None:
        """Write a file, over one that is there; `blocks` gives its content anew for each try."""

        def work() -> None:
            self._make_folder(path)
            handle = self._call(lambda: self._fs.open(self._full(path), "wb"))
            try:
                for block in blocks():
                    self._write(handle, block)
                self._call(handle.close)
            except BaseException:
                self._abandon(handle)
                raise
            if self.local_folder is not None:
                _settle(Path(self._full(path)))

        self._insist(f"write {path}", work)

    def replace(self, path: str, data: bytes) -> None:
        """Put a small file in place in one step, as far as the backend can: readers see the old one or the new one."""
        self._insist(f"write {path}", lambda: self._replace(path, data))

    def remove(self, path: str) -> None:
        """Remove a file; one that is gone already is fine."""

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._full(path))

        self._insist(f"remove {path}", lambda: self._call(work))

    def _replace(self, path: str, data: bytes) -> None:
        full = self._full(path)
        self._make_folder(path)
        if self.local_folder is not None:
            self._call(lambda: write_atomic(Path(full), data))
        elif self._has_folders:
            self._call(lambda: self._fs.pipe_file(f"{full}.new", data))
            self._call(lambda: self._fs.mv(f"{full}.new", full))
        else:
            self._call(lambda: self._fs.pipe_file(full, data))

    def _open(self, url: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            found: tuple[Any, str] = self._call(lambda: url_to_fs(url, skip_instance_cache=True))
        except _TroubleError as trouble:
            scheme = url.partition("://")[0]
            if isinstance(trouble.error, ImportError):
                package = f"dino-exp[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else None
                how = f"pip install '{package}'" if package else str(trouble.error)
                raise UsageError(f"{self.shown}: a package is missing for {scheme}://; install it: {how}") from trouble
            if isinstance(trouble.error, ValueError):
                raise UsageError(
                    f"{self.shown}: {self._text(trouble.error)}; expected a folder, file://, s3://bucket/run, "
                    "gs://bucket/run, ssh://host/folder, or another address that fsspec opens"
                ) from trouble
            raise
        return found

    @property
    def _has_folders(self) -> bool:
        protocol = self._fs.protocol
        return not _NO_FOLDERS.intersection((protocol,) if isinstance(protocol, str) else protocol)

    def _make_folder(self, path: str) -> None:
        folder = self._full(path).rpartition("/")[0]
        if not self._has_folders or folder in self._made:
            return
        if self.local_folder is not None:
            self._call(lambda: make_dirs(Path(folder)))
        else:
            self._call(lambda: self._fs.makedirs(folder, exist_ok=True))
        self._made.add(folder)

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _blocks(self, handle: Any) -> Iterator[bytes]:
        while block := self._call(lambda: handle.read(BLOCK_BYTES)):
            yield block

    def _write(self, handle: Any, block: bytes) -> None:
        self._call(lambda: handle.write(block))

    def _abandon(self, handle: Any) -> None:
        """End an upload that failed without completing it, where the backend can tell the two apart."""
        from fsspec.spec import AbstractBufferedFile

        with contextlib.suppress(_TroubleError):  # the trouble that brought us here is the one to tell
            if isinstance(handle, AbstractBufferedFile):
                handle.closed = True  # or it would be completed when it is collected
                self._call(handle.discard)
            else:
                self._call(handle.close)

    def _call(self, work: Callable[[], T]) -> T:
        """One call of the backend, with a bound on its time. Raises _TroubleError with whatever it raises."""
        try:
            return within(self._patience.answer_secs, work)
        except Exception as error:
            raise _TroubleError(error) from error

    def _insist(self, what: str, work: Callable[[], T], gone: str | None = None) -> T:
        """What `work` returns, after as many tries as patience allows. `gone` names a file that may be missing."""
        num_tries = self._patience.num_tries
        for num_failed in range(1, num_tries + 1):
            try:
                return work()
            except _TroubleError as trouble:
                error = trouble.error
                if gone is not None and isinstance(error, FileNotFoundError):
                    raise GoneError(f"{self.shown}/{gone}: no such file") from error
                if not is_passing(error) or num_failed == num_tries:
                    raise BackupError(self._message(what, error, num_failed)) from error
            secs = self._patience.delay_secs(num_failed, self._draw())
            self._say(f"{self.shown}: {self._text(error)}; trying again in {secs:.1f} s ({num_failed} of {num_tries})")
            self._sleep(secs)
        raise AssertionError("the last try returns or raises")

    def _message(self, what: str, error: Exception, num_tries: int) -> str:
        tried = f", {num_tries} times" if num_tries > 1 else ""
        return f"{self.shown}: could not {what}{tried}: {self._text(error)}{_advice(error)}"

    def _text(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        if self._secret:  # a backend may take it for a part of the name, and say so
            text = text.replace(self._secret, MASK)
        text = strip_credentials(text)[:_MAX_TEXT].rstrip(".")
        return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _user_info(url: str) -> str:
    """What stands between `://` and the last `@` before the path, if it holds a password; else nothing."""
    user, at_sign, _ = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")
    return user if at_sign and ":" in user else ""


def _advice(error: Exception) -> str:
    if lacks_credentials(error):
        return ". Give the backend its credentials by its own means (docs/backup.md, Addresses)"
    if isinstance(error, PermissionError):
        return ". Listing, reading, writing and deleting must be allowed there"
    if isinstance(error, FileNotFoundError):
        return ". The bucket must be there: it is never made here"
    return ". The same command goes on where this one stopped" if is_passing(error) else ""


def _remote(info: dict[str, Any]) -> Remote:
    name = next((name for name in _STAMPS if info.get(name) is not None), None)
    value = None if name is None else info[name]
    if isinstance(value, datetime):  # some backends give seconds in a listing, and this of a single file
        value = value.timestamp()
    return Remote(int(info["size"]), "" if name is None else f"{name}={value}")


def _settle(path: Path) -> None:
    """Return when a file that was just written is on the disk."""
    with LOCAL.append(path) as handle:
        handle.sync()
    LOCAL.sync_dir(path.parent)
