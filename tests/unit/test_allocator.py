"""Memory that is freed and asked for again: whether the kernel has to lend it a second time."""

import platform
import subprocess
import sys

import pytest

from dino_exp import allocator

PROGRAM = """
import resource, sys
from dino_exp.allocator import keep_freed_memory
if sys.argv[1] == "keeps":
    assert keep_freed_memory()
def faults_of_a_block() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"1" * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_a_block()
print(min(faults_of_a_block() for _ in range(3)))
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc knows how to keep freed memory")
def test_freed_memory_serves_the_next_block() -> None:
    usual, kept = faults("usual"), faults("keeps")
    assert kept < 50 < usual


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_addresses_are_left_alone_where_they_are_limited(limit: str) -> None:
    program = (
        f"import resource; resource.setrlimit(resource.{limit}, (4 << 30, resource.RLIM_INFINITY));"
        "from dino_exp.allocator import keep_freed_memory; keep_freed_memory();"
        "print(open('/proc/self/status').read().partition('VmSize:')[2].split()[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1 << 20  # KiB


def test_other_c_libraries_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
