"""Downloads from a server on this machine: whole, wrong, cut off, silent, refused, stopped; nothing is left behind."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cifar_files import SMALL10, archive_bytes, server

from dino_exp.data.cifar import fetch_cifar, load_cifar
from dino_exp.data.datasets import DataError
from dino_exp.data.download import download

DATA = bytes(range(256)) * 20_000
MD5 = hashlib.md5(DATA).hexdigest()


def silent(done: int, total: int) -> None: ...


def fetch(address: str, target: Path, **changes: Any) -> None:
    download(address, target, **{"md5": MD5, "most_bytes": 1 << 24, "tell": silent, **changes})


def refusal(address: str, target: Path, **changes: Any) -> str:
    """The error of a download that fails; nothing may be left of it."""
    with pytest.raises(DataError) as caught:
        fetch(address, target, **changes)
    assert list(target.parent.iterdir()) == []
    assert str(caught.value).startswith(address)
    return str(caught.value)


def test_a_file_comes_whole_and_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    target = tmp_path / "new" / "folder" / "file.bin"
    with server(DATA) as http:
        fetch(http.address, target, tell=lambda done, total: told.append((done, total)))
    assert target.read_bytes() == DATA
    assert [path.name for path in target.parent.iterdir()] == ["file.bin"]
    assert told[-1] == (len(DATA), len(DATA))
    assert sorted(told) == told
    assert len(told) > 3
    assert http.asked == ["dino_exp"]


def test_without_a_length_it_comes_whole_too(tmp_path: Path) -> None:
    with server(DATA, says_length=False) as http:
        fetch(http.address, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_slow_server_is_heard_of_as_it_sends(tmp_path: Path) -> None:
    """By who may stop it, and keeps a lock alive: not only when a whole block has come."""
    heard, data = threading.Event(), DATA[:2000]

    def tell(done: int, total: int) -> None:
        heard.set()

    in_time: list[bool] = []
    with server(data, pause=lambda: in_time.append(heard.wait(5))) as http:
        fetch(http.address, tmp_path / "file", md5=hashlib.md5(data).hexdigest(), tell=tell)
    assert in_time == [True]


def test_other_content_is_refused(tmp_path: Path) -> None:
    with server(DATA[:-1] + b"x") as http:
        text = refusal(http.address, tmp_path / "file")
    assert f"expected {MD5}" in text


@pytest.mark.parametrize("cut_at", [0, 1, 1 << 20, len(DATA) - 1])
def test_a_connection_that_is_cut_is_told(tmp_path: Path, cut_at: int) -> None:
    with server(DATA, cut_at=cut_at) as http:
        text = refusal(http.address, tmp_path / "file")
    assert f"the connection ended after {cut_at} of {len(DATA)} bytes" in text or "IncompleteRead" in text


def test_a_cut_connection_without_a_length_shows_by_the_checksum(tmp_path: Path) -> None:
    with server(DATA, cut_at=1000, says_length=False) as http:
        assert "MD5" in refusal(http.address, tmp_path / "file")


def test_a_refusal_of_the_server_is_told(tmp_path: Path) -> None:
    with server(b"gone", status=404) as http:
        assert "answers 404 (Not Found)" in refusal(http.address, tmp_path / "file")


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        text = refusal(f"http://127.0.0.1:{taken.getsockname()[1]}", tmp_path / "file")
    assert "refused" in text


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        text = refusal(f"http://127.0.0.1:{deaf.getsockname()[1]}", tmp_path / "file", silence_secs=0.1)
    assert "timed out" in text


@pytest.mark.parametrize("says_length", [True, False])
def test_far_too_much_is_not_taken(tmp_path: Path, says_length: bool) -> None:
    with server(DATA, says_length=says_length) as http:
        assert "expected at most 1000" in refusal(http.address, tmp_path / "file", most_bytes=1000)


class StoppedError(Exception):
    pass


def test_whoever_is_told_may_stop_it(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise StoppedError

    with server(DATA) as http, pytest.raises(StoppedError):
        fetch(http.address, tmp_path / "file", tell=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    def full(self: object, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")

    with server(DATA) as http, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino_exp.fsio.WriteHandle.write", full)
        with pytest.raises(OSError, match="No space left"):
            fetch(http.address, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_where_a_download_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with server(DATA, cut_at=5) as http, pytest.raises(DataError):
        fetch(http.address, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_a_killed_download_left_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    dead, living, other = (tmp_path / name for name in (".file.1-a.part", ".file.2-b.part", ".other.3-c.part"))
    for path in (dead, living, other):
        path.write_bytes(b"x")
    os.utime(dead, (1000, 1000))
    os.utime(living, (5000, 5000))
    os.utime(other, (1000, 1000))
    with server(DATA) as http:
        fetch(http.address, tmp_path / "file", clock=lambda: 6000.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file.2-b.part", ".other.3-c.part", "file"]


def test_the_collection_is_fetched_once(tmp_path: Path) -> None:
    data = archive_bytes(SMALL10)
    with server(data) as http:
        address = f"{http.address}/{SMALL10.archive}"
        cifar = replace(SMALL10, address=address, md5=hashlib.md5(data).hexdigest())
        for _ in range(2):
            fetch_cifar(cifar, tmp_path / "data", silent)
        assert len(http.asked) == 1
    train, val = load_cifar(cifar, tmp_path / "data")
    assert (len(train), len(val)) == (250, 50)


def test_an_extracted_folder_is_enough(tmp_path: Path) -> None:
    (tmp_path / SMALL10.folder).mkdir()
    fetch_cifar(replace(SMALL10, address="http://127.0.0.1:1/x.tar.gz"), tmp_path, silent)
