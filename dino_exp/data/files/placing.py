"""Files of the cache's folder: each appears whole under its name, or not at all, whoever else is at it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from dino_exp.errors import DinoExpError
from dino_exp.fsio import LOCAL, Files, WriteHandle
from dino_exp.processes import this_boot_id

log = logging.getLogger("dino_exp")

ELSEWHERE = "Put it elsewhere: paths.cache=<folder>"
CACHE_ADVICE = f"{ELSEWHERE}; do without: data.cache=false; or make images smaller: data.decode_size=<less>"

_TEMPORARY = re.compile(r"\..+?(?:\.(?P<boot>[0-9a-z]{8})-\d+-[0-9a-f]{8})?\.tmp")
_ABANDONED_SECS = 600.0  # what has not grown for so long nobody writes: a task of images takes seconds


class UnwrittenError(DinoExpError):
    """The disk does not take what was prepared: it has no room, or gives errors. Nothing of it is left."""


def boot() -> str:
    """The part of a temporary name that says on which host, since which start, it was written."""
    return (this_boot_id() or "unknown0")[:8]


@contextlib.contextmanager
def placed(path: Path, advice: str, files: Files = LOCAL) -> Iterator[WriteHandle]:
    """A new file that takes its name, durably and over an older one, at the end of a `with` that raises nothing.

    Where locks do not reach from host to host two may write one name at a time: each writes a temporary file of its
    own, and the later one stays. Raises UnwrittenError, with `advice`, where the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{boot()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with files.create(temporary) as file:
            yield file
            file.sync()
        files.replace(temporary, path)
        files.sync_dir(path.parent)
    except BaseException as problem:
        with contextlib.suppress(OSError):
            files.unlink(temporary)
        # Others pass by here too, of whoever hears of the progress: these files are known by their folder.
        if isinstance(problem, OSError) and str(problem.filename).startswith(str(path.parent)):
            raise UnwrittenError(f"{path}: cannot be written ({problem.strerror}). {advice}") from problem
        raise


def sweep(folder: Path, now_secs: float, files: Files = LOCAL) -> None:
    """Remove what writers that were killed have left in a folder whose lock the caller holds.

    The lock says that nobody on this host writes; of other hosts, and of before a restart, it need not.
    """
    for name in files.listdir(folder):
        found = _TEMPORARY.fullmatch(name)
        if found is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            path = folder / name
            if found["boot"] == boot() or now_secs - path.lstat().st_mtime > _ABANDONED_SECS:
                files.unlink(path)
                log.info("removed %s, which was left unfinished", path)
