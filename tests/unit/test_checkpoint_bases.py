"""Saves that build on other checkpoints, when something is wrong with those or with the encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    DELTA,
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

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import chain_length
from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.pruning import PruneRules
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import SaveFailedError

ALL = KeepAny((LatestN(100),))


@pytest.mark.parametrize("restarts", [False, True])
def test_damage_in_what_is_only_referred_to_costs_no_save(tmp_path: Path, restarts: bool) -> None:
    """A save refers to a tensor that did not change without reading it; reading back finds it damaged."""
    KINDS["delta"].save_steps(tmp_path, [1, 2], keep=ALL)
    (chunk,) = CheckpointReader(tmp_path).manifest(2).tensors["student.still"].chunks
    assert "step-000000001" in chunk.pack
    flip(tmp_path / "packs" / chunk.pack, chunk.start + 9)
    manager = open_manager(tmp_path, storage=DELTA, keep=ALL, attempt=2)
    for step in range(3, 6):
        if restarts:
            manager = open_manager(tmp_path, storage=DELTA, keep=ALL, attempt=step)
        manager.save(CodedState(step), request(step))
        assert CheckpointReader(tmp_path).verify([step])["ok"]


def test_an_encoder_that_makes_a_mistake_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is acknowledged was decoded and compared: here it is written as it is in the end."""
    manager = open_manager(tmp_path, storage=KINDS["zstd"].storage, keep=KeepAny((LatestN(1),)))
    manager.save(CodedState(1), request(1))
    with monkeypatch.context() as broken:
        wrong = "dino_exp.checkpoint.blocks.subtract"
        broken.setattr(wrong, lambda way, words, *_: words ^ words.dtype.type(1), raising=True)
        manager.save(CodedState(2), request(2))
    state = CodedState()
    assert open_manager(tmp_path, attempt=2).restore(state).manifest.step == 2
    assert state.is_of_step(2)
    chunks = [entry.chunks[0] for entry in CheckpointReader(tmp_path).manifest(2).tensors.values()]
    assert {chunk.codec for chunk in chunks} == {"raw/1"}


def changed(step: int) -> CodedState:
    state = CodedState(step)
    state.tensors["student.moving"] = state.tensors["student.moving"] + 1e-5
    return state


def test_an_error_at_each_operation_of_a_save_that_supersedes_its_own_base(tmp_path: Path) -> None:
    for fail_at in range(1, 400, 11):
        folder = tmp_path / str(fail_at)
        KINDS["delta"].save_steps(folder, [1, 2], keep=ALL)
        files = FaultyFiles(0, io_error, once=True)
        manager = open_manager(folder, storage=DELTA, keep=ALL, attempt=2, files=files)
        files.num_calls, files.fail_at = 0, fail_at
        try:
            manager.save(changed(2), request(2), supersede=True)
        except SaveFailedError:
            assert files.num_calls >= fail_at
        reader = CheckpointReader(folder)
        assert (reader.steps(), reader.verify()["ok"]) == ([1, 2], True), fail_at
        if files.num_calls < fail_at:
            break
    assert fail_at > 20


def test_superseding_again_and_again_makes_no_endless_chain(tmp_path: Path) -> None:
    lengths = []
    for attempt in range(1, 12):
        manager = open_manager(tmp_path, storage=DELTA, keep=ALL, attempt=attempt)
        manager.save(CodedState(attempt), request(5), supersede=True)
        lengths.append(chain_length(CheckpointReader(tmp_path).manifest(5)))
    assert max(lengths) == DELTA.max_chain + 1


def test_a_manifest_that_would_be_too_large_needs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = open_manager(tmp_path, storage=DELTA, keep=ALL)
    manager.save(CodedState(1), request(1))
    most = int(1.02 * (tmp_path / "step-000000001.json").stat().st_size)
    monkeypatch.setattr("dino_exp.checkpoint.store.MAX_MANIFEST_BYTES", most)
    manager.save(CodedState(2), request(2))
    assert chain_length(CheckpointReader(tmp_path).manifest(2)) == 1


def with_large(step: int) -> CodedState:
    state = CodedState(step)
    state.tensors["student.large"] = torch.randn(500_000, generator=torch.Generator().manual_seed(2))
    return state


def test_a_save_that_fits_is_not_refused(tmp_path: Path) -> None:
    """What changed takes some kilobytes; the state would not fit."""
    files: Any = FaultyFiles(0, io_error, once=True)
    manager = open_manager(tmp_path, storage=DELTA, keep=KeepAny((LatestN(2),)), files=files)
    for step in (1, 2):
        manager.save(with_large(step), request(step))
    files.inner.free_bytes = lambda path: 1_000_000
    manager.save(with_large(3), request(3))
    assert 3 in CheckpointReader(tmp_path).steps()


def test_pruning_counts_what_the_disk_has_back(tmp_path: Path) -> None:
    """Damaged checkpoints still name the pack of a dropped one, which stays for them."""

    def on_disk() -> int:
        return sum(path.stat().st_size for path in [*tmp_path.glob("step-*.json"), *(tmp_path / "packs").iterdir()])

    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    pack_of(tmp_path, 2).unlink()
    KINDS["delta"].save_steps(tmp_path, range(9, 12), keep=ALL, attempt=2)
    before = on_disk()
    assert Ledger(tmp_path).prune(PruneRules(last=1)).freed_bytes == before - on_disk() > 0


@pytest.mark.parametrize("how", ["drop", "save"])
def test_packs_stay_for_a_manifest_that_cannot_be_read(tmp_path: Path, how: str) -> None:
    """It is small: people put it back from a copy."""
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    path = tmp_path / "step-000000003.json"
    good = path.read_bytes()
    if how == "drop":
        flip(path, -5)
        Ledger(tmp_path, keep=KeepAny((LatestN(1),))).prune(PruneRules(last=1))
    else:
        manager = open_manager(tmp_path, storage=DELTA, keep=KeepAny((LatestN(1),)), attempt=2, on_event=Events())
        flip(path, 200)  # in its middle: the index does not see it
        for step in (4, 5):
            manager.save(CodedState(step), request(step))
    path.write_bytes(good)
    assert CheckpointReader(tmp_path).verify([3])["ok"]
