"""One file from the web: checked before it appears under its name, and gone where it was not whole."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dino_exp.data.datasets import DataError
from dino_exp.fsio import LOCAL, Files, WriteHandle, make_dirs

log = logging.getLogger(__name__)

Tell = Callable[[int, int], None]
"""Hears of bytes that have come, and of how many there are (0 where the server does not say). May raise, to stop."""

SILENCE_SECS = 30.0  # for which a server may say nothing
_ABANDONED_SECS = 3600.0  # a download that has not grown for so long has nobody any more
_AT_ONCE = 1 << 16


def download(
    address: str,
    target: Path,
    *,
    md5: str,
    most_bytes: int,
    tell: Tell,
    silence_secs: float = SILENCE_SECS,
    clock: Callable[[], float] = time.time,
    files: Files = LOCAL,
) -> None:
    """Put the file at `address` in place as `target`, durably, once its MD5 is `md5`.

    Several processes may do so at once: each has a temporary file of its own. Whatever goes wrong, none of it is left;
    what a killed download left is removed by the next. Raises DataError that names address and reason, OSError of the
    disk, and what `tell` raises.
    """
    make_dirs(target.parent, files)
    _remove_abandoned(target, clock(), files)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    log.info("downloading %s to %s", address, target)
    try:
        with files.create(temporary) as out:
            found = _receive(address, out, most_bytes=most_bytes, tell=tell, silence_secs=silence_secs)
            if found != md5:
                raise DataError(
                    f"{address}: what came has the MD5 {found}, expected {md5}; the file there is another one, or was "
                    f"damaged on the way. Try again, or put it by hand where it belongs: {target}"
                )
            out.sync()
        files.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            files.unlink(temporary)
        raise
    files.sync_dir(target.parent)


def _receive(address: str, out: WriteHandle, *, most_bytes: int, tell: Tell, silence_secs: float) -> str:
    """Write what the server sends, all of it; its MD5. Raises DataError."""
    digest, done = hashlib.md5(usedforsecurity=False), 0
    request = urllib.request.Request(address, headers={"User-Agent": "dino_exp"})
    with contextlib.ExitStack() as stack:
        with _reasons(address):
            answer: Any = stack.enter_context(urllib.request.urlopen(request, timeout=silence_secs))
            said = answer.headers.get("Content-Length")
            num_bytes = int(said) if said is not None and said.isdecimal() else 0
        while True:
            with _reasons(address):
                part: bytes = answer.read1(_AT_ONCE)  # what has come: who listens hears of a slow server too
            if not part:
                break
            done += len(part)
            if max(done, num_bytes) > most_bytes:
                raise DataError(
                    f"{address}: {max(done, num_bytes)} bytes, expected at most {most_bytes}; not that file"
                )
            digest.update(part)
            out.write(part)
            tell(done, num_bytes)
    if done < num_bytes:
        raise DataError(f"{address}: the connection ended after {done} of {num_bytes} bytes; try again")
    return digest.hexdigest()


@contextlib.contextmanager
def _reasons(address: str) -> Iterator[None]:
    """What may go wrong between here and a server, as a DataError."""
    try:
        yield
    except urllib.error.HTTPError as problem:
        problem.close()
        raise DataError(f"{address}: the server answers {problem.code} ({problem.reason})") from problem
    except (OSError, http.client.HTTPException) as problem:
        reason = problem.reason if isinstance(problem, urllib.error.URLError) else problem
        said = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
        raise DataError(
            f"{address}: it cannot be fetched ({said}); try again, or bring the file from a machine that reaches it"
        ) from problem


def _remove_abandoned(target: Path, now_secs: float, files: Files) -> None:
    for name in files.listdir(target.parent):
        if name.startswith(f".{target.name}.") and name.endswith(".part"):
            with contextlib.suppress(FileNotFoundError):
                path = target.parent / name
                if now_secs - path.stat().st_mtime > _ABANDONED_SECS:
                    files.unlink(path)
                    log.info("removed %s, which a download that was killed had left", path)
