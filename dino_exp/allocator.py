"""How this process keeps the memory that it has freed.

A training step frees and asks for the same large tensors again and again. By default glibc gives such memory back to
the kernel, which fills each page of 4 KiB with zeros before it lends it again: a tenth of a step (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt(3), in <malloc.h>
_NEVER = -1
_HUGEPAGE = 14  # of madvise(2), in <sys/mman.h>
_LARGE_PAGE = 2 << 20
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_PROMISES_NO_MORE_THAN_IT_HAS = "2"


def keep_freed_memory() -> bool:
    """From now on, memory that is freed stays with this process, for its next tensor.

    The peak of a step is as before; threads other than the main one may keep some tens of megabytes each. Where the
    system has large pages to lend, it is asked for them. Returns whether the C library knows how to keep memory: glibc
    does (mallopt(3)), others do not, and all is as it was.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError):
        return False
    if not (mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER)):
        return False
    if not _addresses_are_scarce():
        _prefer_large_pages(libc)
    return True


def _addresses_are_scarce() -> bool:
    """Whether addresses that nothing lies at count, against this process (setrlimit(2)) or against the machine."""
    if any(
        resource.getrlimit(what)[0] != resource.RLIM_INFINITY for what in (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    ):
        return True
    try:
        return _OVERCOMMIT.read_text(encoding="ascii").strip() == _PROMISES_NO_MORE_THAN_IT_HAS
    except OSError:
        return True


def _prefer_large_pages(libc: ctypes.CDLL) -> None:
    """For half the memory of the machine, from where the heap ends now; none of it is taken before it is used."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    start = libc.malloc(size)  # the heap grows to hold it, and does not shrink when it is freed
    if start is None:
        return
    first = -(-start // _LARGE_PAGE) * _LARGE_PAGE
    libc.madvise(first, (start + size - first) // _LARGE_PAGE * _LARGE_PAGE, _HUGEPAGE)  # advice, so it may be refused
    libc.free(start)
