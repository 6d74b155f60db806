"""Packs of a failing disk, and packs and places in them of a stranger: the manifest's own bytes, or a typed error."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support.checkpoints import ToyState, pack_of, save_steps
from support.hostile import NASTY_NUMBERS, amounts, attempt, changed_json, fuzz, torn

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.digests import content_digest
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import CorruptCheckpointError, DinoExpError

NAME = "step-000000002.json"
CHUNK_FIELDS = ("offset", "shape", "start", "stored_bytes", "key", "codec", "bases")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    save_steps(folder, [1, 2])
    return folder


@pytest.fixture
def body(folder: Path) -> dict[str, Any]:
    return unseal((folder / NAME).read_bytes(), NAME)


@amounts(150, 4_000)
def test_a_torn_pack_is_noticed_with_and_without_verification(num: int, folder: Path) -> None:
    pack, reader = pack_of(folder, 2), CheckpointReader(folder)
    whole, tensors = pack.read_bytes(), reader.load_tensors(2)

    def check(data: bytes) -> None:
        pack.write_bytes(data)
        if attempt(lambda: loaded_alike(reader, tensors)) == "read":
            assert len(data) == len(whole)  # a flip in the header, which is not needed to read
        if data != whole:
            assert not reader.verify([2])["ok"]
        reader.restore(state := ToyState(), 2)
        assert data == whole
        assert state.is_of_step(2)

    fuzz(torn(whole) | st.just(whole), check, num)


def loaded_alike(reader: CheckpointReader, tensors: dict[str, torch.Tensor]) -> None:
    found = reader.load_tensors(2)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@st.composite
def headers(draw: Callable[..., Any]) -> tuple[bytes, bytes]:
    """A length and a text to stand at the beginning of a pack."""
    length = draw(st.sampled_from([n for n in NASTY_NUMBERS if isinstance(n, int) and 0 <= n < 2**64]))
    entry = {"dtype": draw(st.sampled_from(("F32", "F64", "X", ""))), "shape": [draw(st.sampled_from((0, 6, 2**40)))]}
    offsets = [draw(st.sampled_from((0, 24, -1, 10**15))), draw(st.sampled_from((0, 24, 2**63)))]
    text = repr({"student.weight": {**entry, "data_offsets": offsets}}).replace("'", '"').encode()
    return length.to_bytes(8, "little"), draw(
        st.sampled_from((text, b"", b" " * 400, b"\xff" * 33, b'{"__metadata__":1}'))
    )


@amounts(80, 5_000)
def test_a_lying_header_changes_nothing(num: int, folder: Path, body: dict[str, Any]) -> None:
    """Its digest fits, as a stranger would seal it: what is read goes by the manifest alone."""
    pack = pack_of(folder, 2)
    whole, before = pack.read_bytes(), body["packs"][0]["header_bytes"]

    def check(header: tuple[bytes, bytes]) -> None:
        head = b"".join(header)
        pack.write_bytes(head + whole[before:])
        changed = copy.deepcopy(body)
        changed["packs"][0] |= {
            "header_bytes": len(head), "bytes": len(head) + len(whole) - before, "header_digest": content_digest(head)
        }  # fmt: skip
        for entry in changed["tensors"].values():
            for chunk in entry["chunks"]:
                chunk["start"] += len(head) - before
        (folder / NAME).write_bytes(seal(changed))
        reader, state = CheckpointReader(folder), ToyState()
        assert reader.verify([2])["ok"]
        reader.restore(state, 2)
        assert state.is_of_step(2)

    fuzz(headers().filter(lambda header: header[1] != b""), check, num, both=False)


def bytes_as_said(manifest: Manifest, name: str, packs: Path) -> bytes:
    """A tensor's content by the manifest's word, put together without the package's reading code."""
    entry = manifest.tensors[name]
    item = DTYPES[entry.dtype].item_bytes
    whole = np.zeros((*entry.shape, item), np.uint8)
    for chunk in entry.chunks:
        stored = (packs / chunk.pack).read_bytes()[chunk.start : chunk.start + chunk.stored_bytes]
        box = tuple(slice(at, at + size) for at, size in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = np.frombuffer(stored, np.uint8).reshape(*chunk.shape, item)
    return whole.tobytes()


@st.composite
def moved(draw: Callable[..., Any], body: dict[str, Any]) -> dict[str, Any]:
    """A manifest whose tensors lie elsewhere, in pieces, over each other, or are other tensors; its digests fit."""
    changed = copy.deepcopy(body)
    tensors = changed["tensors"]
    name = draw(st.sampled_from(sorted(tensors)))
    entry, num_bytes = tensors[name], changed["packs"][0]["bytes"]
    match draw(st.sampled_from(("start", "dtype", "pieces", "field", "shape"))):
        case "start":
            entry["chunks"][0]["start"] = draw(st.integers(num_bytes - 48, num_bytes + 2))
        case "dtype":
            entry["dtype"] = draw(st.sampled_from(sorted(DTYPES)))
        case "pieces" if entry["shape"] and entry["shape"][0]:
            first = entry["chunks"][0]
            row = first["stored_bytes"] // entry["shape"][0]
            shape = [1, *entry["shape"][1:]]
            at = draw(st.lists(st.integers(0, entry["shape"][0]), min_size=1, max_size=4))
            entry["chunks"] = [
                first
                | {
                    "offset": [n, *first["offset"][1:]],
                    "shape": shape,
                    "stored_bytes": row,
                    "start": first["start"] + row * n,
                }
                for n in at
            ]
        case "field":
            entry["chunks"][0] = draw(changed_json(entry["chunks"][0]))
        case _:
            shape = draw(
                st.sampled_from([[3, 2], [6], [1, 6], [6, 1, 1], [2, 0, 2**50], [2**49, 2**49, 0], [0] * 17, []])
            )
            entry["shape"] = entry["chunks"][0]["shape"] = shape
            entry["chunks"][0]["offset"] = [0] * len(shape)
    return changed


def sealed_over(body: dict[str, Any], pack: bytes) -> bytes:
    """Every digest made to fit what lies at the place, where there is such a place."""
    for entry in body["tensors"].values():
        for chunk in entry["chunks"]:
            start, size = chunk.get("start"), chunk.get("stored_bytes")
            if type(start) is int and type(size) is int and start >= 0 and 0 <= size < 10**6:
                chunk["stored_digest"] = chunk["content_digest"] = content_digest(pack[start : start + size])
    del body["state_digest"]
    return seal(body)


@amounts(200, 4_000)
def test_tensors_of_a_stranger_are_what_lies_at_the_place(num: int, folder: Path, body: dict[str, Any]) -> None:
    pack, reader = pack_of(folder, 2).read_bytes(), CheckpointReader(folder)

    def check(changed: dict[str, Any]) -> None:
        (folder / NAME).write_bytes(sealed_over(changed, pack))
        attempt(lambda: reader.verify([2]))
        attempt(lambda: reader.restore(ToyState(), 2))
        loaded, manifest = reader.load_tensors(2), reader.manifest(2)
        for name, tensor in loaded.items():
            assert tuple(tensor.shape) == manifest.tensors[name].shape
            flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert flat == bytes_as_said(manifest, name, folder / "packs")

    fuzz(moved(body), check, num)


def test_the_only_chunk_of_an_empty_tensor_has_its_shape(folder: Path, body: dict[str, Any]) -> None:
    """Found by the fuzz test above: it was loaded as the chunk is, and did not fit the model."""
    body["tensors"]["loss.empty"]["chunks"][0]["shape"] = [0, 0]
    (folder / NAME).write_bytes(seal(body))
    with pytest.raises(CorruptCheckpointError, match="another shape"):
        CheckpointReader(folder).restore(ToyState(), 2)


def test_a_pack_that_leads_elsewhere_is_damage(folder: Path, tmp_path: Path) -> None:
    pack, reader = pack_of(folder, 2), CheckpointReader(folder)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder / "packs", elsewhere)
    pack.unlink()
    pack.symlink_to(elsewhere / pack.name)
    with pytest.raises(CorruptCheckpointError, match="link"):
        reader.load_tensors(2)
    pack.unlink()
    (elsewhere / pack.name).rename(pack)
    assert reader.verify()["ok"]
    (folder / "packs").rename(elsewhere.with_name("packs.old"))
    (folder / "packs").symlink_to(elsewhere.with_name("packs.old"))
    with pytest.raises(DinoExpError, match="is a link"):
        CheckpointReader(folder)
    (folder / "packs").unlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(DinoExpError, match="is a link"):
        CheckpointReader(tmp_path / "link")
