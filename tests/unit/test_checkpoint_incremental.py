"""Checkpoints that hold what changed: what they refer to, how far, and what happens when that is gone."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    COMPANIONS,
    KINDS,
    CodedState,
    Events,
    FaultyFiles,
    flip,
    io_error,
    open_manager,
    pack_of,
    request,
)

from dino_exp.checkpoint.codec_names import DELTA, RAW, ZSTD
from dino_exp.checkpoint.manifest import Manifest, chain_length, closure
from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.storage import Storage
from dino_exp.errors import ConfigError

DELTA_KIND, ZSTD_KIND = KINDS["delta"], KINDS["zstd"]
ALL = KeepAny((LatestN(100),))


def codec(manifest: Manifest, name: str) -> str:
    return manifest.tensors[name].chunks[0].codec


def saved(folder: Path, steps: range, kind: str = "delta") -> CheckpointReader:
    KINDS[kind].save_steps(folder, steps, keep=ALL)
    return CheckpointReader(folder)


def test_each_tensor_is_stored_in_the_way_that_pays(tmp_path: Path) -> None:
    reader = saved(tmp_path, range(1, 3))
    first, second = reader.manifest(1), reader.manifest(2)
    assert [codec(first, name) for name in ("student.moving", "teacher.moving", "student.weight")] == [ZSTD, DELTA, RAW]
    assert codec(second, "student.moving") == codec(second, "optimizer.moving.exp_avg_sq") == DELTA
    sizes = [pack_of(tmp_path, step).stat().st_size for step in (1, 2)]
    assert sizes[1] < 0.9 * sizes[0]


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    reader = saved(tmp_path, range(1, 3))
    places = [reader.manifest(step).tensors["student.still"].chunks[0].pack for step in (1, 2)]
    assert len(set(places)) == 1
    manager = open_manager(tmp_path, storage=DELTA_KIND.storage, keep=ALL, attempt=2)
    manager.save(CodedState(2), request(3))  # all tensors as they were: no pack at all
    assert len(list((tmp_path / "packs").iterdir())) == 2
    assert CheckpointReader(tmp_path).verify() == {"ok": True, "checked": 3, "damaged": []}
    assert reader.manifest(3).state_digest == reader.manifest(2).state_digest


def test_equal_tensors_of_one_checkpoint_are_stored_once(tmp_path: Path) -> None:
    """At the start of a training the teacher is a copy of the student."""
    state = CodedState(1)
    state.tensors["teacher.moving"] = state.tensors["student.moving"].clone()
    open_manager(tmp_path, storage=ZSTD_KIND.storage).save(state, request(1))
    manifest = CheckpointReader(tmp_path).manifest(1)
    assert manifest.tensors["teacher.moving"] == manifest.tensors["student.moving"]


def test_a_chain_is_as_long_as_it_may_be_and_then_begins_anew(tmp_path: Path) -> None:
    reader = saved(tmp_path, range(1, 8))
    manifests = [reader.manifest(step) for step in range(1, 8)]
    assert [chain_length(manifest) for manifest in manifests] == [1, 2, 3, 1, 2, 3, 1]
    third = manifests[2]
    reached = {third.bases[place].pack for place in closure(third.tensors["teacher.moving"].chunks[0], third.bases)}
    assert {int(name[5:14]) for name in reached} == {1, 2, 3}


def test_compressed_checkpoints_need_no_other(tmp_path: Path) -> None:
    reader = saved(tmp_path, range(1, 5), "zstd")
    assert [chain_length(reader.manifest(step)) for step in range(1, 5)] == [1] * 4


@pytest.mark.parametrize("way", ["flipped", "missing", "unreadable", "manifest"])
def test_a_base_that_cannot_be_read_is_done_without(tmp_path: Path, way: str) -> None:
    DELTA_KIND.save_steps(tmp_path, [1, 2], keep=ALL)
    events, files = Events(), FaultyFiles(0, io_error, once=True)
    manager = open_manager(tmp_path, storage=DELTA_KIND.storage, keep=ALL, attempt=2, on_event=events, files=files)
    match way:
        case "flipped":
            (chunk,) = CheckpointReader(tmp_path).manifest(2).tensors["teacher.moving"].chunks
            flip(pack_of(tmp_path, 2), chunk.start + 20)
        case "missing":
            pack_of(tmp_path, 2).unlink()
        case "manifest":
            flip(tmp_path / "step-000000002.json", 100)
        case "unreadable":
            original = files.inner.open_read

            def open_read(path: Path) -> object:
                if path == pack_of(tmp_path, 2):
                    raise io_error()
                return original(path)

            files.inner.open_read = open_read  # type: ignore[method-assign,assignment]
    manager.save(CodedState(3), request(3))
    assert chain_length(CheckpointReader(tmp_path).manifest(3)) == 1
    assert [event["action"] for event in events.of("trouble")][:1] == ["read step 2"]
    state = CodedState()
    assert manager.restore(state).manifest.step == 3
    assert state.is_of_step(3)


def test_one_bad_byte_costs_what_builds_on_it_and_no_more(tmp_path: Path) -> None:
    reader = saved(tmp_path, range(1, 7))
    (chunk,) = reader.manifest(2).tensors["student.moving"].chunks
    flip(pack_of(tmp_path, 2), chunk.start + 20)
    verdict = reader.verify()
    assert {place["step"] for place in verdict["damaged"]} == {2, 3}
    assert {place["tensor"] for place in verdict["damaged"]} == {"student.moving", "teacher.moving"}
    state = CodedState()
    manager = open_manager(tmp_path, storage=DELTA_KIND.storage, keep=ALL, attempt=2)
    assert manager.restore(state).manifest.step == 6
    assert state.is_of_step(6)


def test_bad_bytes_under_the_newest_lead_back_to_one_that_is_whole(tmp_path: Path) -> None:
    reader = saved(tmp_path, range(1, 7))
    (chunk,) = reader.manifest(4).tensors["student.moving"].chunks
    flip(pack_of(tmp_path, 4), chunk.start + 20)
    state = CodedState()
    manager = open_manager(tmp_path, storage=DELTA_KIND.storage, keep=ALL, attempt=2)
    restored = manager.restore(state)
    assert (restored.manifest.step, restored.quarantined) == (3, (6, 5, 4))
    assert state.is_of_step(3)
    assert CheckpointReader(tmp_path).verify()["ok"]


def test_a_state_of_other_shapes_is_written_for_itself(tmp_path: Path) -> None:
    """Another model in the same folder, or another sharding."""
    DELTA_KIND.save_steps(tmp_path, [1], keep=ALL)
    state = CodedState(2)
    state.tensors["student.moving"] = torch.randn(5, 80)
    state.tensors["teacher.moving"] = state.tensors["teacher.moving"].double()
    open_manager(tmp_path, storage=DELTA_KIND.storage, keep=ALL, attempt=2).save(state, request(2))
    reader = CheckpointReader(tmp_path)
    assert [codec(reader.manifest(2), name) for name in ("student.moving", "teacher.moving")] == [ZSTD, ZSTD]
    assert torch.equal(reader.load_tensors(2)["student.moving"], state.tensors["student.moving"])


def test_a_repeated_save_of_a_step_writes_nothing_twice(tmp_path: Path) -> None:
    """As when an owed evaluation is added to the state."""
    DELTA_KIND.save_steps(tmp_path, [1, 2], keep=ALL)
    manager = open_manager(tmp_path, storage=DELTA_KIND.storage, keep=ALL, attempt=2)
    state = CodedState(2)
    state.values["best"] = {"step": 2, "value": 0.5}
    manager.save(state, request(2), supersede=True)
    assert len(list((tmp_path / "packs").iterdir())) == 2
    restored = CodedState()
    open_manager(tmp_path, attempt=3).restore(restored)
    assert restored.values["best"] == {"step": 2, "value": 0.5}


def test_encoding_holds_no_second_copy_of_the_state(tmp_path: Path) -> None:
    """Sixteen tensors of 2 MB: a save against an earlier one takes blocks, not tensors."""
    generator = torch.Generator().manual_seed(3)
    weights = {f"student.{n}": torch.randn(512, 1024, generator=generator) for n in range(8)}
    weights |= {f"teacher.{n}": weights[f"student.{n}"] + 1e-3 for n in range(8)}
    storage = Storage(codec="delta", companions=COMPANIONS)
    manager = open_manager(tmp_path, storage=storage, keep=ALL)
    state = CodedState()
    state.tensors = dict(weights)
    manager.save(state, request(1))
    for tensor in weights.values():
        tensor.mul_(1.001)
    tracemalloc.start()
    manager.save(state, request(2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20  # of a state of 32 MB; each tensor alone has two blocks, and up to seven chunks to build on


@pytest.mark.parametrize(
    "values",
    [
        {"codec": "gzip"},
        {"max_chain": 0},
        {"max_chain": 21},
        {"threads": -1},
        {"companions": {"a.": "b.", "b.": "c."}},
    ],
)
def test_impossible_storage_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(Storage(), **values)  # type: ignore[arg-type]


def test_what_is_listed_adds_up_to_what_lies_on_the_disk(tmp_path: Path) -> None:
    """Each pack counts once, whoever shares it; alone a checkpoint frees what nothing else reaches."""
    DELTA_KIND.save_steps(tmp_path, range(1, 6), keep=ALL)
    reader = CheckpointReader(tmp_path)
    listing = reader.listing()
    files = [*tmp_path.glob("step-*.json"), *(tmp_path / "packs").iterdir()]
    assert listing.disk_bytes == sum(path.stat().st_size for path in files)
    for row in listing.rows:
        assert row["bytes"] == row["shared_bytes"] + row["frees_bytes"]
        assert row["content_bytes"] == sum(tensor.nbytes for tensor in CodedState(1).tensors.values())
    shared = {row["step"]: row["shared_bytes"] > 0 for row in listing.rows}
    assert shared == {1: True, 2: True, 3: True, 4: True, 5: True}
    alone = listing.rows[2]
    assert (
        alone["frees_bytes"] == pack_of(tmp_path, 3).stat().st_size + (tmp_path / "step-000000003.json").stat().st_size
    )
