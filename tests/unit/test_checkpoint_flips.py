"""One changed bit in every byte of every file of a checkpoints folder: noticed or harmless, never a wrong load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import KINDS, FaultyFiles, Kind, ToyState, open_manager, save_steps

from dino_exp.checkpoint.manifest_parse import parse_manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.restoring import load_into
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.verify import read_verified
from dino_exp.errors import CorruptCheckpointError

Survived = Callable[[str, int], None]
FLIPS = "changed bits in files of a checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_steps(folder, [1, 2])
    return folder


def flips(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] for at in range(len(data))]


def test_every_byte_of_a_manifest(folder: Path, survived: Survived) -> None:
    variants = flips(folder / "step-000000002.json")
    for data in variants:
        with pytest.raises(CorruptCheckpointError):
            parse_manifest(data, "manifest")
    survived(FLIPS, len(variants))


@pytest.mark.parametrize("kind", ["raw", "zstd", "delta"])
def test_every_byte_of_a_pack(kind: str, tmp_path: Path, survived: Survived) -> None:
    KINDS[kind].save_steps(tmp_path / "c", [1, 2])
    store, num_noticed = Store(tmp_path / "c"), 0
    for path in (tmp_path / "c" / "packs").iterdir():
        if kind == "delta" or "step-000000002" in path.name:
            num_noticed += flip_all(path, store, KINDS[kind])
    survived(FLIPS, num_noticed)


def flip_all(path: Path, store: Store, kind: Kind) -> int:
    """A bit in each byte of a pack that step 2 needs: how many there are."""
    stride = 1 if kind.storage.codec == "raw" else 5
    whole, variants, num_noticed = path.read_bytes(), flips(path)[::stride], 0
    for data in variants:
        path.write_bytes(data)
        state = kind.make()
        try:
            load_into(state, read_verified(store, 2), store, ())
        except CorruptCheckpointError:
            num_noticed += 1
        else:
            assert state.is_of_step(2)
    path.write_bytes(whole)
    # Of a pack of an earlier step only the header and what is built on is read: the rest is not its own.
    read = read_places(store, path.name, len(whole))
    assert num_noticed == sum(at in read for at in range(0, len(whole), stride))
    return num_noticed


def read_places(store: Store, pack: str, num_bytes: int) -> set[int]:
    """Where in a pack a changed bit matters to step 2."""
    manifest, _ = store.read(2)
    (entry,) = (entry for entry in manifest.packs if entry.name == pack)
    chunks = [chunk for tensor in manifest.tensors.values() for chunk in tensor.chunks]
    places = set(range(entry.header_bytes))
    for chunk in (*chunks, *manifest.bases):
        if chunk.pack == pack:
            places |= set(range(chunk.start, chunk.start + chunk.stored_bytes))
    assert max(places) < num_bytes
    return places


@pytest.mark.parametrize("kind", ["zstd", "delta"])
def test_a_changed_block_is_noticed_by_loading_alone(kind: str, tmp_path: Path) -> None:
    KINDS[kind].save_steps(tmp_path / "c", [1, 2])
    store = Store(tmp_path / "c")
    manifest = read_verified(store, 2)
    for path in (tmp_path / "c" / "packs").iterdir():
        whole = path.read_bytes()
        chunks = [chunk for entry in manifest.tensors.values() for chunk in entry.chunks]
        for chunk in (chunk for chunk in (*chunks, *manifest.bases) if chunk.pack == path.name):
            for at in range(chunk.start, chunk.start + chunk.stored_bytes, 29):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
                with pytest.raises(CorruptCheckpointError):
                    load_into(KINDS[kind].make(), manifest, store, ())
        path.write_bytes(whole)


def test_a_flip_between_verification_and_loading_is_noticed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "c")
    store = Store(tmp_path / "c")
    manifest = read_verified(store, 2)
    (path,) = (tmp_path / "c" / "packs").glob("step-000000002.*")
    start = min(entry.chunks[0].start for entry in manifest.tensors.values())
    for data in flips(path)[start:]:
        path.write_bytes(data)
        with pytest.raises(CorruptCheckpointError):
            load_into(ToyState(), manifest, store, ())


def test_every_byte_of_the_registry(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "c")
    path = tmp_path / "c" / "registry.json"
    expected = [{**row, "verified": None} for row in CheckpointReader(folder).rows()]
    for data in flips(path):
        path.write_bytes(data)
        assert [{**row, "verified": None} for row in CheckpointReader(tmp_path / "c").rows()] == expected


def test_the_manager_falls_back_from_any_flip(folder: Path, tmp_path: Path) -> None:
    """A sample of places through the whole path: open, restore, quarantine."""
    names = ["step-000000002.json", "packs/step-000000002.a001.r00000.safetensors", "registry.json"]
    for name in names:
        for at, data in list(enumerate(flips(folder / name)))[::97]:
            shutil.copytree(folder, tmp_path / "c")
            (tmp_path / "c" / name).write_bytes(data)
            state = ToyState()
            manager = open_manager(tmp_path / "c", attempt=2, files=FaultyFiles(0, once=True))
            restored = manager.restore(state)
            assert state.is_of_step(restored.manifest.step), (name, at)
            assert restored.manifest.step == (2 if name == "registry.json" else 1), (name, at)
            shutil.rmtree(tmp_path / "c")


def test_a_manifest_cut_at_any_byte(folder: Path) -> None:
    whole = (folder / "step-000000002.json").read_bytes()
    for size in range(len(whole)):
        with pytest.raises(CorruptCheckpointError):
            parse_manifest(whole[:size], "manifest")


def test_a_pack_cut_at_any_byte(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "c")
    (path,) = (tmp_path / "c" / "packs").glob("step-000000002.*")
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptCheckpointError):
            read_verified(Store(tmp_path / "c"), 2)
