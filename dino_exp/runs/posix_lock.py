"""A POSIX lock on one file, and what this process must remember about it.

POSIX locks belong to a process, not to a descriptor. That is why they are used: a loader worker forked by a
killed owner does not keep the run locked, as it would with flock. It is also why care is needed: a second
lock by the same process would succeed, and closing any descriptor of the file drops the lock. So what this
process holds is remembered here, and such a file is never opened again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import TypeAlias

from dino_exp.config.typed import override, train_command
from dino_exp.errors import RefusedError

Inode: TypeAlias = tuple[int, int]
_held: dict[Inode, int] = {}  # locked file -> pid: a forked child inherits the table, but not the locks
_guard = threading.Lock()


def is_held_here(path: Path) -> bool:
    """Whether this very process holds the lock. Opens nothing."""
    inode = _inode_at(path)
    with _guard:
        return inode is not None and _held.get(inode) == os.getpid()


def try_lock(path: Path) -> int | None:
    """Lock the file, made if it does not exist; None when it is locked already. The descriptor must stay
    open.

    Raises RefusedError where the file cannot be written or the file system cannot lock.
    """
    while not is_held_here(path):
        fd = _open(path)
        if not _lock(fd, path):
            os.close(fd)
            return None
        inode = _inode_of(fd)
        if inode == _inode_at(path):
            with _guard:
                _held[inode] = os.getpid()
            return fd
        os.close(fd)  # somebody deleted the file between open and lock: ours is no longer the one that counts
    return None


def unlock(fd: int) -> None:
    """Drop the lock by closing the descriptor that `try_lock` gave."""
    with _guard:
        if _held.get(_inode_of(fd)) == os.getpid():
            del _held[_inode_of(fd)]
        os.close(fd)


def is_locked_elsewhere(path: Path) -> bool:
    """Whether another process of this kernel holds the lock. Creates nothing.

    Never called for a lock of this process: closing the descriptor would drop it.
    """
    assert not is_held_here(path), "asking would drop this process's own lock"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return True
        raise
    finally:
        os.close(fd)
    return False


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RefusedError(
            f"{path}: cannot be opened for writing ({error.strerror}); make the folder writable, or go on "
            f"in a new run: `{train_command(override('fork', path.parent))}`"
        ) from error


def _lock(fd: int, path: Path) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        os.close(fd)
        raise RefusedError(
            f"{path}: this file system cannot lock ({error.strerror}), expected POSIX locks; "
            "put the outputs elsewhere: `paths.outputs=<folder>`"
        ) from error
    return True


def _inode_of(fd: int) -> Inode:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _inode_at(path: Path) -> Inode | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
