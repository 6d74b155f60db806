"""Real file systems that are too small."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest


def mount(folder: Path, num_bytes: int) -> None:
    """Skips the test where this is not allowed."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a small file system cannot be made here: there is no `mount`")
    if done.returncode:
        pytest.skip(f"a small file system cannot be made here: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Whatever is still open there."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no page free."""
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
