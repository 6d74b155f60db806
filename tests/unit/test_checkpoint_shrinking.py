"""Thinned milestones and checkpoints freed of dropped ones: what stays, what goes, and that all of it is as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    DELTA,
    KINDS,
    SCHEDULE,
    THIN_TO_TEACHER,
    CodedState,
    Events,
    FaultyFiles,
    Kind,
    flip,
    io_error,
    open_manager,
    pack_of,
    request,
)

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import chain_steps
from dino_exp.checkpoint.pins import pin
from dino_exp.checkpoint.policies import (
    BestN,
    KeepAny,
    LatestN,
    Milestones,
    Pinned,
    milestone_from_text,
    retention_from_json,
    retention_to_json,
)
from dino_exp.checkpoint.pruning import foreign_packs
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.registry import read_index
from dino_exp.checkpoint.shrinking import Shrinker, Shrunk
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import CheckpointInfo, RetentionPlan
from dino_exp.errors import CheckpointError, CorruptCheckpointError, SaveFailedError

ALL = KeepAny((LatestN(100),))
EARLY = Milestones((milestone_from_text("1"), milestone_from_text("2")))  # steps 2 and 4
THINNING = KeepAny((LatestN(1), Pinned(), EARLY, THIN_TO_TEACHER))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "packs").iterdir()}


def drop(folder: Path, *steps: int) -> Ledger:
    ledger = Ledger(folder, keep=ALL)
    keep = tuple(step for step in ledger.rows if step not in steps)
    ledger.apply(RetentionPlan(keep=keep, drop=steps, reasons=dict.fromkeys(steps, "drop: for this test")))
    return ledger


def is_as_it_was(folder: Path, step: int, kind: Kind = KINDS["delta"]) -> bool:
    CheckpointReader(folder).restore(state := kind.make(), step)
    return state.is_of_step(step)


@pytest.mark.parametrize("kind", ["raw", "zstd", "delta"])
def test_old_milestones_keep_the_teacher(tmp_path: Path, kind: str) -> None:
    storage, events = KINDS[kind].storage, Events()
    manager = open_manager(tmp_path, storage=storage, keep=THINNING, on_event=events)
    for step in range(1, 7):
        manager.save(CodedState(step), request(step))
    reader = CheckpointReader(tmp_path)
    rows = {row["step"]: row for row in reader.rows()}
    assert {step: row["resumable"] for step, row in rows.items()} == {2: False, 4: False, 6: True}
    for step in (2, 4):
        found, expected = reader.load_tensors(step), CodedState(step)
        assert list(found) == ["teacher.moving"]
        assert torch.equal(found["teacher.moving"], expected.tensors["teacher.moving"])
        manifest = reader.manifest(step)
        assert chain_steps(manifest) == 1
        assert manifest.state_digest != manifest.full_state_digest is not None
    assert is_as_it_was(tmp_path, 6)
    assert reader.verify()["ok"]
    assert [event["steps"] for event in events.of("thinned")] == [[2], [4]]
    assert all(event["freed_bytes"] > 0 for event in events.of("thinned") if kind != "delta")


def test_a_thinned_checkpoint_of_raw_ones_is_an_ordinary_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    manager = open_manager(tmp_path, keep=THINNING)
    for step in range(1, 6):
        manager.save(CodedState(step), request(step))
    (pack,) = CheckpointReader(tmp_path).manifest(2).packs
    found = load_file(tmp_path / "packs" / pack.name)
    assert torch.equal(found["teacher.moving"], CodedState(2).tensors["teacher.moving"])


def test_what_a_thinned_checkpoint_is_of_is_remembered(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep=ALL)
    manager.save(CodedState(2), request(2))
    whole = CheckpointReader(tmp_path).manifest(2)
    ledger = Ledger(tmp_path, keep=ALL)
    shrunk = Shrinker(ledger, Storage()).thin({2: ("teacher.",)})
    assert shrunk.thinned == (2,)
    assert shrunk.freed_bytes > 0
    thin = CheckpointReader(tmp_path).manifest(2)
    assert thin.full_state_digest == whole.state_digest
    assert (thin.metrics, thin.record, thin.state, thin.created_at) == (
        whole.metrics, whole.record, whole.state, whole.created_at,
    )  # fmt: skip


def test_a_thinned_checkpoint_cannot_be_resumed_and_says_so(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep=THINNING)
    for step in range(1, 6):
        manager.save(CodedState(step), request(step))
    with pytest.raises(CheckpointError, match="only a part of the checkpoint of step 2 was kept: teacher"):
        manager.restore(CodedState(), at=2)
    assert manager.restore(CodedState()).manifest.step == 5


INFOS = [CheckpointInfo(step=step, epoch=step // 2, metrics={"knn_top1": step % 5}) for step in range(1, 9)]


def plan(*rules: Any, infos: Any = INFOS) -> RetentionPlan:
    return KeepAny((*rules, EARLY, THIN_TO_TEACHER)).plan(infos, SCHEDULE)


def test_only_milestones_that_nothing_else_keeps_are_thinned() -> None:
    assert dict(plan(LatestN(1)).thin) == {2: ("teacher.",), 4: ("teacher.",)}
    assert set(plan(LatestN(5)).thin) == {2}
    assert set(plan(LatestN(1), BestN("knn_top1", num=1)).thin) == {2}
    assert plan(LatestN(1)).reasons[2] == "thin to teacher: milestone epoch 1"
    pinned = [CheckpointInfo(step=info.step, epoch=info.epoch, pinned=info.step == 2) for info in INFOS]
    assert set(plan(LatestN(1), Pinned(), infos=pinned).thin) == {4}


def test_the_floor_is_never_thinned() -> None:
    """The newest, the newest that is verified, and the last healthy one."""
    infos = [CheckpointInfo(step=step, epoch=step // 2, healthy=step < 3, verified=step < 5) for step in (2, 4)]
    assert dict(plan(LatestN(0), infos=infos).thin) == {}
    again = [CheckpointInfo(step=2, epoch=1, resumable=False), CheckpointInfo(step=7, epoch=3)]
    assert dict(plan(LatestN(1), infos=again).thin) == {}


def test_the_rule_is_recorded() -> None:
    assert retention_from_json(json.loads(json.dumps(retention_to_json(THINNING)))) == THINNING


def test_a_pin_set_after_the_plan_counts(tmp_path: Path) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    ledger = Ledger(tmp_path, keep=ALL)
    pin(tmp_path, 2, "wanted whole")
    assert Shrinker(ledger, DELTA).thin({1: ("teacher.",), 2: ("teacher.",)}).thinned == (1,)
    assert is_as_it_was(tmp_path, 2)


def test_packs_of_dropped_checkpoints_go_when_those_that_need_them_are_written_anew(tmp_path: Path) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 7), keep=ALL)  # chains 1-2-3 and 4-5-6
    digests = {row["step"]: row["state_digest"] for row in CheckpointReader(tmp_path).rows()}
    ledger = drop(tmp_path, 1, 4)
    assert {int(name[5:14]) for name in names(tmp_path)} == set(range(1, 7))
    assert len(foreign_packs(ledger.rows)) == 2
    before = sum(path.stat().st_size for path in (tmp_path / "packs").iterdir())
    shrunk = Shrinker(ledger, DELTA).compact(everything=True)
    after = sum(path.stat().st_size for path in (tmp_path / "packs").iterdir())
    assert (shrunk.rewritten, shrunk.freed_bytes) == ((2, 3, 5, 6), before - after)
    assert after < before
    assert {int(name[5:14]) for name in names(tmp_path)} == {2, 3, 5, 6}
    reader = CheckpointReader(tmp_path)
    assert {row["step"]: row["state_digest"] for row in reader.rows()} == {step: digests[step] for step in (2, 3, 5, 6)}
    assert reader.verify()["ok"]
    assert all(is_as_it_was(tmp_path, step) for step in (2, 3, 5, 6))
    assert [chain_steps(reader.manifest(step)) for step in (2, 3)] == [1, 2]
    assert not foreign_packs(read_index(Store(tmp_path)).rows)
    assert Shrinker(ledger, DELTA).compact(everything=True) == Shrunk()


def test_the_middle_of_a_chain_may_go_too(tmp_path: Path) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    Shrinker(drop(tmp_path, 2), DELTA).compact(everything=True)
    assert {int(name[5:14]) for name in names(tmp_path)} == {1, 3}
    assert all(is_as_it_was(tmp_path, step) for step in (1, 3))


def test_a_training_does_it_by_itself_once_it_is_worth_it(tmp_path: Path) -> None:
    """With the last two kept, packs of dropped ones never are most of what lies here."""
    manager = open_manager(tmp_path, storage=DELTA, keep=KeepAny((LatestN(2),)), on_event=(events := Events()))
    for step in range(1, 12):
        manager.save(CodedState(step), request(step))
        rows = read_index(Store(tmp_path)).rows
        assert sum(foreign_packs(rows).values()) <= sum(sum(row.pack_bytes) for row in rows.values())
        assert {name for row in rows.values() for name in row.packs} == names(tmp_path)
    assert events.of("compacted")
    assert all(is_as_it_was(tmp_path, step) for step in (10, 11))


def test_nothing_is_replaced_by_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that makes a mistake, or memory that does."""
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    ledger = drop(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("step-*.json")}
    monkeypatch.setattr(
        "dino_exp.checkpoint.blocks.subtract", lambda way, words, *_: words ^ words.dtype.type(1), raising=True
    )
    with pytest.raises(CorruptCheckpointError, match="digest of its content differs"):
        Shrinker(ledger, DELTA).compact(everything=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("step-*.json")} == before
    assert not [name for name in names(tmp_path) if ".g" in name]
    assert all(is_as_it_was(tmp_path, step) for step in (2, 3))


def test_a_damaged_checkpoint_is_not_written_anew(tmp_path: Path) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    ledger = drop(tmp_path, 1)
    (chunk,) = CheckpointReader(tmp_path).manifest(2).tensors["teacher.moving"].chunks
    flip(pack_of(tmp_path, 2), chunk.start + 9)
    with pytest.raises(CorruptCheckpointError):
        Shrinker(ledger, DELTA).compact(everything=True)
    assert CheckpointReader(tmp_path).steps() == [2, 3]


def test_trouble_while_shrinking_costs_no_checkpoint(tmp_path: Path) -> None:
    """The save itself is done: an error afterwards is told, and tried again after the next save."""
    for fail_at in range(1, 400, 19):
        folder, events = tmp_path / str(fail_at), Events()
        files = FaultyFiles(0, io_error, once=True)
        manager = open_manager(folder, storage=DELTA, keep=THINNING, files=files, on_event=events)
        manager.save(CodedState(1), request(1))
        manager.save(CodedState(2), request(2))
        files.num_calls, files.fail_at = 0, fail_at
        try:
            manager.save(CodedState(3), request(3))
        except SaveFailedError:
            files.fail_at = 0
            manager.save(CodedState(3), request(3))
        files.fail_at = 0
        manager.save(CodedState(4), request(4))
        assert CheckpointReader(folder).verify()["ok"]
        assert is_as_it_was(folder, 4)
        if files.num_calls < fail_at:
            break
