"""Waiting, trying again and giving up, without a network."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from uuid import uuid4

import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from support.backups import target_of

from dino_exp.backup.patience import Patience, is_passing
from dino_exp.backup.target import GoneError
from dino_exp.errors import BackupError, CorruptCheckpointError
from dino_exp.waiting import within


class NoCredentialsError(Exception):
    """As botocore names it."""


class SSHException(Exception):  # noqa: N818 (as paramiko names it)
    """Something went wrong on the way."""


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(errno.EIO, "x"), True),
        (EOFError(), True),
        (SSHException(), True),
        (FileNotFoundError(), False),
        (PermissionError(), False),
        (NotImplementedError(), False),
        (ValueError(), False),
        (OSError(errno.ENOSPC, "x"), False),
        (OSError(errno.EROFS, "x"), False),
        (NoCredentialsError(), False),
    ],
)
def test_what_passes_by_itself(error: Exception, passes: bool) -> None:
    assert is_passing(error) is passes


def test_waiting_doubles_is_bounded_and_never_the_same_for_all() -> None:
    patience = Patience(first_secs=1, most_secs=5)
    assert [patience.delay_secs(number, 1.0) for number in range(1, 6)] == [1, 2, 4, 5, 5]
    assert patience.delay_secs(2, 0.0) == 1.0


def test_a_call_that_hangs_is_left_to_itself() -> None:
    gate = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, gate.wait)
    gate.set()
    assert within(30, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        within(30, lambda: 1 // 0)


def test_it_sleeps_between_tries_and_tells_each() -> None:
    said: list[str] = []
    slept: list[float] = []
    target = target_of(f"memory://{uuid4().hex}", said, Patience(num_tries=3, first_secs=8, most_secs=8))
    target._sleep = slept.append
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise ConnectionResetError("line one\nline two")

    with pytest.raises(BackupError, match="could not look, 3 times: ConnectionResetError: line one line two"):
        target._insist("look", lambda: target._call(work))
    assert len(calls) == 3
    assert len(slept) == len(said) == 2
    assert all(4 <= secs <= 8 for secs in slept)
    assert said[0].endswith("(1 of 3)")


def test_errors_of_files_here_are_not_the_targets() -> None:
    """A source that cannot be read is no reason to try the target again."""
    said: list[str] = []
    target = target_of(f"memory://{uuid4().hex}", said)

    def blocks() -> list[bytes]:
        raise OSError(errno.EIO, "the disk here")

    with pytest.raises(OSError, match="the disk here"):
        target.send("file", blocks)
    assert said == []


@pytest.mark.parametrize("where", ["folder", "memory", "folders elsewhere"])
def test_files_of_a_target(where: str, tmp_path: Path) -> None:
    target = target_of(tmp_path / "x" if where == "folder" else f"memory://{uuid4().hex}")
    if where == "folders elsewhere":  # as over ssh: folders are made, and the index is moved into its place
        target._fs, target._root = DirFileSystem(str(tmp_path), LocalFileSystem()), "far"
    assert target.listing() == {}
    target.send("a/b.bin", lambda: [b"one", b"two"])
    target.replace("c.json", b"{}")
    target.replace("c.json", b"[]")
    assert {path: remote.bytes for path, remote in target.listing().items()} == {"a/b.bin": 6, "c.json": 2}
    assert target.local_folder == (tmp_path / "x" if where == "folder" else None)
    assert target.listing()["a/b.bin"] == target.look_at("a/b.bin")
    assert target.read_small("c.json", 2) == b"[]"
    with pytest.raises(CorruptCheckpointError, match="more than 1 bytes"):
        target.read_small("c.json", 1)
    target.remove("c.json")
    target.remove("c.json")
    for ask in (lambda: target.look_at("c.json"), lambda: target.read_small("c.json", 9)):
        with pytest.raises(GoneError, match="no such file"):
            ask()


def test_a_full_or_closed_place_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    target = target_of(tmp_path / "file" / "x", said)
    with pytest.raises(BackupError, match="could not write a: FileExistsError"):
        target.send("a", lambda: [b""])
    assert said == []
