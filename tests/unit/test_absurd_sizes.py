"""Sizes that a stranger claims: nothing is allocated, read or built on their word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import ToyState, pack_of, save_steps
from support.hostile import REFUSED, attempt, memory_bound, seal_text

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.manifest_parse import MAX_TENSORS
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.stored import load_stored
from dino_exp.errors import CheckpointError, CorruptCheckpointError
from dino_exp.fsio import MAX_JSON_VALUES, DamagedFileError, parse_json
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.owner import load_owner
from dino_exp.runs.record import load_record

NAME = "step-000000002.json"
FEW_BYTES = 64 << 20  # beyond what the process has: threads and arenas take some


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    save_steps(folder, [1, 2])
    return folder


def huge(path: Path, num_bytes: int = 2 << 30, tail: bytes = b"") -> None:
    """A file of so many zeros, which take no room on the disk, and `tail`."""
    with path.open("wb") as handle:
        handle.truncate(num_bytes)
        handle.seek(num_bytes)
        handle.write(tail)


def every_verb(folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
    reader = CheckpointReader(folder)
    reader.rows()
    assert not reader.verify([2])["ok"]
    for read in (lambda: reader.load_tensors(2, "student.weight"), lambda: reader.restore(ToyState(), 2)):
        say(attempt(read))


@pytest.mark.parametrize("tail", [b"", b',"digest":"' + b"0" * 64 + b'"}\n'], ids=["zeros", "sealed"])
def test_manifests_and_indexes_of_2_gb(folder: Path, tail: bytes) -> None:
    huge(folder / NAME, tail=tail)
    huge(folder / "registry.json", tail=tail)
    huge(folder / "pins.json", tail=tail)
    with memory_bound(FEW_BYTES):
        with pytest.raises(CorruptCheckpointError, match="expected at most"):
            load_pins(folder)
        (folder / "pins.json").unlink()
        every_verb(folder)


def test_records_of_2_gb(tmp_path: Path) -> None:
    for name in ("run.json", "owner.json", "config.yaml", "config.canonical.json", "events.jsonl"):
        huge(tmp_path / name, 1 << 31)
    with memory_bound(FEW_BYTES):
        for read in (
            lambda: load_record(tmp_path / "run.json"),
            lambda: load_owner(tmp_path / "owner.json"),
            lambda: load_stored(tmp_path),
            lambda: list(read_lines(tmp_path / "events.jsonl")),
        ):
            with pytest.raises(DamagedFileError):
                read()


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Rewrite the manifest, sealed, after a change of it and of its largest tensor."""
    body = unseal((folder / NAME).read_bytes(), NAME)
    change(body, body["tensors"]["student.weight"])
    del body["state_digest"]
    (folder / NAME).write_bytes(seal(body))


def shape_of(*shape: int, pack_bytes: int = 0, chunks: int = 1) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A tensor of float32 of that shape, whose bytes the manifest sees in the pack."""

    def change(body: dict[str, Any], entry: dict[str, Any]) -> None:
        num_bytes = 4
        for size in shape:
            num_bytes *= size
        pack, first = body["packs"][0], entry["chunks"][0]
        pack["bytes"] = pack_bytes or max(pack["bytes"], pack["header_bytes"] + num_bytes)
        entry["shape"] = list(shape)
        rows = shape[0] // chunks
        entry["chunks"] = [
            first | {"offset": [n * rows, *[0] * (len(shape) - 1)], "shape": [rows, *shape[1:]],
                     "start": pack["header_bytes"], "stored_bytes": num_bytes // chunks}
            for n in range(chunks)
        ]  # fmt: skip

    return change


def header_of(num_bytes: int) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(body: dict[str, Any], _: dict[str, Any]) -> None:
        body["packs"][0] |= {"header_bytes": num_bytes, "bytes": num_bytes + 10**6}
        for entry in body["tensors"].values():
            for chunk in entry["chunks"]:
                chunk["start"] = num_bytes

    return change


ABSURD = {
    "2^50 bytes in a small pack": shape_of(2**48),
    "2^45 bytes in two chunks": shape_of(2**43, chunks=2),
    "2^40 bytes in a thousand chunks": shape_of(2**38, chunks=1024),
    "2^51 bytes": shape_of(2**49),
    "2^800 bytes": shape_of(*[2**50] * 16),
    "nothing, in strides beyond 64 bits": shape_of(0, 2**49, 2**49),
    "nothing, of 2^50 columns": shape_of(2, 0, 2**50),
    "a header of 10^12 bytes": header_of(10**12),
    "a header of 10^8 bytes": header_of(10**8),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_tensors_and_headers(name: str, folder: Path) -> None:
    changed(folder, ABSURD[name])
    said: list[str] = []
    with memory_bound(FEW_BYTES):
        every_verb(folder, said.append)
    assert said[:2] == [REFUSED] * 2


def test_a_header_as_large_as_a_file_of_holes(folder: Path) -> None:
    """The pack is as long as its manifest says: 10^12 bytes that take no room."""
    changed(folder, header_of(10**12))
    huge(pack_of(folder, 2), 10**12 + 10**6)
    with memory_bound(FEW_BYTES):
        every_verb(folder)


def test_a_tensor_as_large_as_a_file_of_holes_is_not_loaded_into_a_small_model(folder: Path) -> None:
    changed(folder, shape_of(2**38))
    huge(pack_of(folder, 2), unseal((folder / NAME).read_bytes(), NAME)["packs"][0]["bytes"])
    reader = CheckpointReader(folder)
    with memory_bound(FEW_BYTES), pytest.raises(CheckpointError, match="does not fit into memory"):
        reader.load_tensors(2, "student.weight")


PIECES = {"lists": b"[],", "objects": b'{"a":1},', "texts": b'"a",', "quotes": b'""'}


@pytest.mark.parametrize("name", PIECES)
def test_json_that_would_grow_in_memory(name: str) -> None:
    """64 MB of brackets would make gigabytes of objects."""
    text = b"[" + PIECES[name] * ((20 << 20) // len(PIECES[name])) + b"1]"
    with memory_bound(FEW_BYTES), pytest.raises(DamagedFileError, match=f"more than {MAX_JSON_VALUES} values"):
        parse_json(text, "bomb")


def test_a_sealed_manifest_that_would_grow_in_memory(folder: Path) -> None:
    text = b'{"packs":[' + b"[]," * (20 << 20) + b'[]],"tensors":{' + b'"a":{},' * 10 + b'"b":{}},"world_size":1}'
    (folder / NAME).write_bytes(seal_text(text))
    assert 60 << 20 < (folder / NAME).stat().st_size < 64 << 20
    with memory_bound(4 * (64 << 20) + FEW_BYTES):  # its bytes, and copies of them
        assert [row["step"] for row in CheckpointReader(folder).rows()] == [1]


def test_as_many_tensors_as_are_allowed_are_read(folder: Path) -> None:
    """The bound on values leaves room for the largest manifest that the format allows."""
    body = unseal((folder / NAME).read_bytes(), NAME)
    entry = seal({"x": body["tensors"]["student.weight"]})
    signs = sum(entry.count(sign) for sign in (b",", b"[", b"{"))
    assert signs * MAX_TENSORS < MAX_JSON_VALUES
    assert entry.count(b'"') * MAX_TENSORS < 2 * MAX_JSON_VALUES
