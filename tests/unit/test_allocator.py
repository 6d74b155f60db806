"""Memory that is freed and asked for again: whether the kernel has to lend it a second time."""

import platform
import subprocess
import sys

import pytest

from dino_exp import allocator

PROGRAM = """
import resource, sys
import torch
from dino_exp.allocator import keep_freed_memory
if sys.argv[1] == "keeps":
    assert keep_freed_memory()
def faults_of_a_tensor() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults_of_a_tensor()
print(min(faults_of_a_tensor() for _ in range(3)))
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc knows how to keep freed memory")
def test_freed_memory_serves_the_next_tensor() -> None:
    usual, kept = faults("usual"), faults("keeps")
    assert kept < 50 < usual


def test_other_c_libraries_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
