from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import FaultyFiles, io_error

from dino_exp.errors import CorruptCheckpointError
from dino_exp.fsio import (
    LOCAL,
    DamagedFileError,
    WriteHandle,
    json_depth,
    make_dirs,
    parse_json,
    read_json_bounded,
    write_atomic,
    write_shared,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomic(path, "first")
    write_atomic(path, b"second", durable=False)
    assert path.read_bytes() == b"second"
    assert LOCAL.listdir(tmp_path) == ["run.json"]


def test_write_atomic_with_an_error_at_every_operation(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for fail_at in range(1, 100):
        path.write_text("old")
        files = FaultyFiles(fail_at, io_error, once=True)
        try:
            write_atomic(path, "new", files=files)
        except OSError:
            assert path.read_text() in ("old", "new")
        assert LOCAL.listdir(tmp_path) == ["run.json"], fail_at
        if files.num_calls < fail_at:
            break
    assert path.read_text() == "new"
    assert fail_at > 5


def test_write_atomic_takes_over_the_leftover_of_a_dead_writer(tmp_path: Path) -> None:
    (tmp_path / ".run.json.tmp").write_text("torn")
    write_atomic(tmp_path / "run.json", "whole")
    assert LOCAL.listdir(tmp_path) == ["run.json"]


def test_several_may_write_one_shared_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    texts = [str(number) * 10_000 for number in range(4)]
    found: set[str] = set()

    def write_often(text: str) -> None:
        for _ in range(100):
            write_shared(path, text, durable=False)
            found.add(path.read_text())

    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write_often, texts))  # raises what one of them raised
    assert found <= set(texts)
    assert LOCAL.listdir(tmp_path) == ["report.html"]


def test_what_a_writer_of_a_shared_file_left_behind_goes_after_an_hour(tmp_path: Path) -> None:
    ends = ("0123abcd.tmp", "4567cdef.tmp", "0123abcd-notes.tmp")
    old, young, others = (tmp_path / f".a[b].html.{end}" for end in ends)
    for path in (old, young, others):
        path.write_text("half")
    for path in (old, others):
        os.utime(path, (0, 0))
    write_shared(tmp_path / "a[b].html", "whole")
    assert LOCAL.listdir(tmp_path) == sorted([young.name, others.name, "a[b].html"])


def test_make_dirs_makes_what_is_missing(tmp_path: Path) -> None:
    make_dirs(tmp_path / "a" / "b" / "c")
    make_dirs(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_create_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "pack").write_text("mine")
    with pytest.raises(FileExistsError):
        LOCAL.create(tmp_path / "pack")


def test_append_grows_a_file(tmp_path: Path) -> None:
    for word in (b"one\n", b"two\n"):
        with LOCAL.append(tmp_path / "events.jsonl") as handle:
            handle.write(word)
    assert (tmp_path / "events.jsonl").read_bytes() == b"one\ntwo\n"


def test_writing_accepts_any_buffer(tmp_path: Path) -> None:
    with LOCAL.create(tmp_path / "data") as handle:
        handle.write(b"")
        handle.write(memoryview(bytearray(b"abcdef"))[1:5])
        handle.write_at(1, b"X")
        handle.close()
    assert LOCAL.read_bytes(tmp_path / "data") == b"bXde"


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "step.json"
    (tmp_path / "secret").write_text("secret")
    match kind:
        case "link":
            path.symlink_to(tmp_path / "secret")
        case "dangling link":
            path.symlink_to(tmp_path / "nowhere")
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
    with pytest.raises(DamagedFileError):
        LOCAL.read_bytes(path)
    assert LOCAL.size(path) is None


def test_a_folder_that_is_a_link_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "packs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        LOCAL.mkdir(tmp_path / "packs")


def test_free_bytes_are_those_for_a_writer_without_privileges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LOCAL.free_bytes(tmp_path) > 0
    found = os.statvfs_result((512, 4096, 1000, 600, 500, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    assert LOCAL.free_bytes(tmp_path) == 500 * 4096
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        LOCAL.free_bytes(tmp_path / "nowhere")


def test_what_is_absent(tmp_path: Path) -> None:
    assert LOCAL.listdir(tmp_path / "nowhere") == []
    assert LOCAL.size(tmp_path / "nowhere") is None
    with pytest.raises(FileNotFoundError):
        LOCAL.read_bytes(tmp_path / "nowhere")


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as handle:
        handle.truncate(2 << 30)  # sparse: 2 GiB that no disk holds
    with pytest.raises(CorruptCheckpointError, match="2147483648 bytes, expected at most"):
        read_json_bounded(path, max_bytes=1 << 20, error=CorruptCheckpointError)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e999",
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        "[" * 65 + "]" * 65,
        '{"a":' * 100_000,
        "[" * 100_000,
        "9" * 10_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        "{} {}",
        "'a'",
    ],
)
def test_strict_json_refuses(text: str) -> None:
    with pytest.raises(DamagedFileError):
        parse_json(text.encode("latin-1"), "test")


@given(json_values)
def test_strict_json_reads_what_json_writes(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), "test", max_depth=200) == value


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"", 0),
        (b"1", 0),
        (b"]]]", 0),
        (b"]][[", 0),
        (b"[" * 70_000, 70_000),
        (b'{"[[[": "\\"]]{{"}', 1),
        (b"[\xff{", 2),
    ],
)
def test_depth_of_what_is_no_json(text: bytes, depth: int) -> None:
    assert json_depth(text) == depth


@given(json_values)
def test_depth_counts_brackets_outside_strings(value: Any) -> None:
    def depth(part: Any) -> int:
        if isinstance(part, dict):
            part = list(part.values())
        return 1 + max(map(depth, part), default=0) if isinstance(part, list) else 0

    assert json_depth(json.dumps(value).encode()) == depth(value)


def test_errors_of_the_system_are_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as caught:
        read_json_bounded(tmp_path / "a.json", files=FaultyFiles(1, io_error))  # type: ignore[arg-type]
    assert caught.value.errno == errno.EIO


def test_an_error_of_writing_names_the_file() -> None:
    """The system knows a descriptor only, and "No space left on device" alone says nothing."""
    path = Path("/dev/full")
    with WriteHandle(os.open(path, os.O_WRONLY), path) as full, pytest.raises(OSError, match="on device: '/dev/full'"):
        full.write(b"x")


def test_nothing_waits_for_the_other_end_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for is_read in (True, False):
        for name in ("pipe", "link"):
            for open_it in (LOCAL.append, LOCAL.open_read):
                with pytest.raises(DamagedFileError, match="special file"):
                    open_it(tmp_path / name)
        if is_read:
            os.close(reader)
    with pytest.raises(DamagedFileError):
        LOCAL.append(tmp_path)
