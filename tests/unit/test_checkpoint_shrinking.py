"""Thinned milestones and checkpoints freed of dropped ones: what stays, what goes, and that all of it is as it was."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    COMPANIONS,
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
    no_space,
    open_manager,
    pack_of,
    quick_files,
    request,
)

from dino_exp.checkpoint.blocks import encode_block, words_of
from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.choosing import Choice
from dino_exp.checkpoint.digests import content_digest
from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import Chunk, Manifest, TensorEntry, chain_length
from dino_exp.checkpoint.pack import Key, PackWriter, write_pack
from dino_exp.checkpoint.pins import pin
from dino_exp.checkpoint.policies import (
    BestN,
    KeepAny,
    LatestN,
    Milestones,
    Pinned,
    ThinMilestones,
    milestone_from_text,
    retention_from_json,
    retention_to_json,
)
from dino_exp.checkpoint.pruning import PruneRules, Shrunk, foreign_packs
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.registry import read_index
from dino_exp.checkpoint.residuals import Way
from dino_exp.checkpoint.shrinking import Shrinker
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import CheckpointInfo, RetentionPlan
from dino_exp.errors import CheckpointError, CorruptCheckpointError, LockedError, SaveFailedError
from dino_exp.fsio import Files

ALL = KeepAny((LatestN(100),))
EARLY = Milestones((milestone_from_text("1"), milestone_from_text("2")))  # steps 2 and 4
THINNING = KeepAny((LatestN(1), Pinned(), EARLY, THIN_TO_TEACHER))


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "packs").iterdir()}


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in [*folder.glob("step-*.json"), *(folder / "packs").iterdir()])


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
        assert chain_length(manifest) == 1
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
    before = on_disk(tmp_path)
    shrunk = Shrinker(ledger, DELTA).compact(everything=True)
    after = on_disk(tmp_path)
    assert (shrunk.rewritten, shrunk.freed_bytes) == ((2, 3, 5, 6), before - after)
    assert after < before
    assert {int(name[5:14]) for name in names(tmp_path)} == {2, 3, 5, 6}
    reader = CheckpointReader(tmp_path)
    assert {row["step"]: row["state_digest"] for row in reader.rows()} == {step: digests[step] for step in (2, 3, 5, 6)}
    assert reader.verify()["ok"]
    assert all(is_as_it_was(tmp_path, step) for step in (2, 3, 5, 6))
    assert [chain_length(reader.manifest(step)) for step in (2, 3)] == [1, 2]
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
    drop(tmp_path, 1)
    ledger = Ledger(tmp_path, keep=ALL, on_event=(events := Events()))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("step-*.json")}
    monkeypatch.setattr(
        "dino_exp.checkpoint.blocks.subtract", lambda way, words, *_: words ^ words.dtype.type(1), raising=True
    )
    assert Shrinker(ledger, DELTA).compact(everything=True) == Shrunk()
    monkeypatch.undo()
    assert all("digest of its content differs" in event["error"] for event in events.of("trouble"))
    assert [event["action"] for event in events.of("trouble")] == ["write step 2 anew", "write step 3 anew"]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("step-*.json")} == before
    assert not [name for name in names(tmp_path) if ".g" in name]
    assert all(is_as_it_was(tmp_path, step) for step in (2, 3))


def test_a_damaged_checkpoint_is_left_alone_and_costs_no_other(tmp_path: Path) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 7), keep=ALL)  # chains 1-2-3 and 4-5-6
    ledger = drop(tmp_path, 1, 4)
    (chunk,) = CheckpointReader(tmp_path).manifest(2).tensors["teacher.moving"].chunks
    flip(pack_of(tmp_path, 2), chunk.start + 9)
    assert Shrinker(ledger, DELTA).compact(everything=True).rewritten == (5, 6)
    assert (set(ledger.damaged), CheckpointReader(tmp_path).steps()) == ({2, 3}, [2, 3, 5, 6])
    assert all(is_as_it_was(tmp_path, step) for step in (5, 6))


def test_trouble_while_shrinking_costs_no_checkpoint(tmp_path: Path) -> None:
    """The save itself is done: an error afterwards is told, and tried again after the next save."""
    for fail_at in range(1, 400, 37):
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


def test_a_disk_that_is_full_in_the_middle_leaves_no_half_pack(tmp_path: Path) -> None:
    files: Any = FaultyFiles(0, no_space, once=True)
    create = files.inner.create

    def full(path: Path) -> Any:
        handle = create(path)
        if ".g" in path.name:
            handle.write(b"begun")
            files.fail_at = files.num_calls + 2
        return handle

    files.inner.create = full
    events = Events()
    manager = open_manager(tmp_path, storage=DELTA, keep=KeepAny((LatestN(2),)), on_event=events, files=files)
    for step in range(1, 7):
        manager.save(CodedState(step), request(step))
        rows = read_index(Store(tmp_path)).rows
        assert names(tmp_path) == {name for row in rows.values() for name in row.packs}
    assert "making checkpoints smaller" in {event["action"] for event in events.of("trouble")}


def test_one_bad_milestone_costs_no_other(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, storage=KINDS["zstd"].storage, keep=THINNING)
    for step in (1, 2):
        manager.save(CodedState(step), request(step))
    flip(pack_of(tmp_path, 2))
    for step in range(3, 7):
        manager.save(CodedState(step), request(step))
    assert {row["step"]: row["resumable"] for row in CheckpointReader(tmp_path).rows()} == {2: True, 4: False, 6: True}


def test_a_pin_set_while_it_is_being_thinned_counts(tmp_path: Path) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    before = names(tmp_path)
    shrinker = Shrinker(Ledger(tmp_path, keep=ALL), DELTA, guard=lambda: pin(tmp_path, 2, "wanted whole"))
    assert shrinker.thin({2: ("teacher.",)}) == Shrunk()
    assert is_as_it_was(tmp_path, 2)
    assert names(tmp_path) == before


@pytest.mark.parametrize("parts", [("techer.",), ("teacher.", "student.", "optimizer.", "loss.")])
def test_nothing_is_thinned_to_nothing_or_to_itself(tmp_path: Path, parts: tuple[str, ...]) -> None:
    keep = KeepAny((LatestN(1), EARLY, ThinMilestones(parts)))
    manager = open_manager(tmp_path, keep=keep, on_event=(events := Events()))
    for step in range(1, 6):
        manager.save(CodedState(step), request(step))
    assert events.of("thinned") == []
    assert all(is_as_it_was(tmp_path, step) for step in (2, 4, 5))


def test_equal_tensors_of_a_raw_thinned_file_lie_each_under_its_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    manager = open_manager(tmp_path, keep=THINNING)
    for step in range(1, 4):
        state = CodedState(step)
        state.tensors |= {"teacher.a.bias": torch.zeros(80), "teacher.b.bias": torch.zeros(80)}
        manager.save(state, request(step))
    manifest = CheckpointReader(tmp_path).manifest(2)
    assert load_file(tmp_path / "packs" / manifest.packs[0].name).keys() == manifest.tensors.keys()


def test_nothing_goes_on_the_word_of_an_index(tmp_path: Path) -> None:
    """Sealed by whoever wrote it: it says that no checkpoint needs packs of others."""
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    path = tmp_path / "registry.json"
    body = unseal(path.read_bytes(), path.name)
    for row in body["versions"][0]["checkpoints"]:
        row["packs"] = {name: size for name, size in row["packs"].items() if f"{row['step']:09d}" in name}
    path.write_bytes(seal(body))
    drop(tmp_path, 1)
    assert CheckpointReader(tmp_path).verify()["ok"]


class Racing(Files):
    """A training that compacts just before the n-th opening of a pack."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.num = folder, at, 0

    def open_read(self, path: Path) -> Any:
        self.num += path.suffix == ".safetensors"
        if self.num == self.at:
            self.num += 1
            Shrinker(Ledger(self.folder, keep=ALL), DELTA).compact(everything=True)
        return super().open_read(path)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("verb", ["load_tensors", "restore", "verify", "plan_prune"])
def test_a_checkpoint_is_read_while_it_is_written_anew(tmp_path: Path, verb: str, at: int) -> None:
    KINDS["delta"].save_steps(tmp_path, range(1, 4), keep=ALL)
    drop(tmp_path, 1)
    reader = CheckpointReader(tmp_path, Racing(tmp_path, at))
    match verb:
        case "load_tensors":
            assert torch.equal(reader.load_tensors(3)["student.moving"], CodedState(3).tensors["student.moving"])
        case "restore":
            reader.restore(state := CodedState(), 3)
            assert state.is_of_step(3)
        case "verify":
            assert reader.verify() == {"ok": True, "checked": 2, "damaged": []}
        case "plan_prune":
            assert reader.plan_prune(PruneRules()).damaged == {}


def sharded(folder: Path, step: int, tensors: dict[str, torch.Tensor], before: Manifest | None) -> Manifest:
    """A committed checkpoint of tensors in two parts each, as two ranks would write it; `before`: differences to it."""
    store = Store(folder)
    open_manager(folder, keep=ALL).save(CodedState(step), request(step))
    whole, _ = store.read(step)
    made, bases = {}, list[Chunk]()

    def part(name: str, at: int, pack: PackWriter) -> Chunk:
        data = memoryview(tensors[name][2 * at : 2 * at + 2].contiguous().numpy().tobytes())
        key, codec, pieces = Key(f"{name}#{at}", "float32", (2, 200)), "raw/1", [data]
        if before is not None:
            bases.append(before.tensors[name].chunks[at])
            other = CheckpointReader(folder).load_tensors(before.step)[name][2 * at : 2 * at + 2].contiguous().numpy()
            words = [words_of(memoryview(array), 4) for array in (data, other.tobytes())]
            codec, pieces = "delta/1", encode_block(words[0], words[1:], Choice(Way.DIFFERENCE, (0,)))
        start, size, digest = pack.add(key, pieces) if before is None else pack.add_bytes(key.name, pieces)
        return Chunk(
            offset=(2 * at, 0), shape=(2, 200), pack=pack.name, key=key.name, start=start, stored_bytes=size,
            codec=codec, stored_digest=digest, content_digest=content_digest(data),
            bases=() if before is None else (len(bases) - 1,),
        )  # fmt: skip

    def fill(pack: PackWriter) -> None:
        for name in tensors:
            made[name] = TensorEntry(dtype="float32", shape=(4, 200), chunks=(part(name, 0, pack), part(name, 1, pack)))

    keys = [Key(f"{name}#{at}", "float32", (2, 200)) for name in tensors for at in (0, 1)]
    packs = (*write_pack(store, PackName(step, 2, 0), keys, fill, None), *(() if before is None else before.packs))
    manifest = replace(
        whole,
        tensors=made,
        bases=tuple(bases),
        packs=packs,
        world_size=2,
        attempt=2,
        state_digest=None,
        content_bytes=6400,
    )
    store.commit(manifest, supersede=True)
    return manifest


@pytest.mark.parametrize("companions", [{}, COMPANIONS])
@pytest.mark.parametrize("same", [False, True])
def test_tensors_in_parts_are_written_anew_part_by_part(tmp_path: Path, companions: dict[str, str], same: bool) -> None:
    student = torch.randn(4, 200, generator=torch.Generator().manual_seed(1))
    if same:
        student[2:] = student[:2]
    first = {"student.w": student, "teacher.w": student + 1e-4}
    second = {name: tensor * 1.0001 for name, tensor in first.items()}
    sharded(tmp_path, 2, second, sharded(tmp_path, 1, first, None))
    assert CheckpointReader(tmp_path).verify()["ok"]
    shrinker = Shrinker(drop(tmp_path, 1), Storage(codec="zstd", companions=companions))
    assert shrinker.compact(everything=True).rewritten == (2,)
    found = CheckpointReader(tmp_path).load_tensors(2)
    assert all(torch.equal(found[name], second[name]) for name in second)


def compacting(folder: Path, files: Any, guard: Any = None, fail_at: int = 0) -> Ledger:
    """Checkpoints 2 and 3, which need packs of 1, which is gone, are written anew, as far as it goes."""
    KINDS["delta"].save_steps(folder, range(1, 4), keep=ALL)
    ledger = Ledger(folder, keep=ALL, files=files)
    ledger.apply(RetentionPlan(keep=(2, 3), drop=(1,), reasons={1: "drop: for this test"}))
    files.num_calls, files.fail_at = 0, fail_at
    with contextlib.suppress(OSError, LockedError):
        Shrinker(ledger, DELTA, guard).compact(everything=True)
    return ledger


def test_a_lock_that_is_lost_between_two_commits_costs_neither(tmp_path: Path) -> None:
    calls = iter([None, LockedError("taken over")])

    def guard() -> None:
        error = next(calls)
        if error is not None:
            raise error

    compacting(tmp_path, quick_files(), guard)
    assert CheckpointReader(tmp_path).verify() == {"ok": True, "checked": 2, "damaged": []}


@pytest.mark.parametrize("error", [io_error, no_space])
def test_an_error_in_the_middle_costs_nothing_then_or_later(tmp_path: Path, error: Any) -> None:
    for fail_at in range(1, 400, 17):
        folder, files = tmp_path / str(fail_at), FaultyFiles(0, error, once=True)
        ledger = compacting(folder, files, fail_at=fail_at)
        assert CheckpointReader(folder).verify()["ok"], fail_at
        with contextlib.suppress(OSError, CorruptCheckpointError, KeyError):
            ledger.forget_removed()
            ledger.apply(RetentionPlan(keep=(3,), drop=(2,), reasons={2: "drop: for this test"}))
        assert CheckpointReader(folder).verify()["ok"], fail_at
        if files.num_calls < fail_at:
            break
    assert fail_at > 40
