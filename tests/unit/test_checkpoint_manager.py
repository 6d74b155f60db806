"""The manager on real files, and the traps of the usual tutorial manager."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import (
    SCHEDULE,
    Events,
    ToyState,
    flip,
    open_manager,
    pack_of,
    quick_files,
    request,
    save_steps,
    saved_manifest,
)

from dino_exp.checkpoint.generators import restore_generators
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.pins import save_pins
from dino_exp.checkpoint.policies import BestN, EverySteps, KeepAny, LatestN, Milestones, milestone_from_text
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import RetentionPlan, SaveContext, Schedule
from dino_exp.errors import CheckpointError, CorruptCheckpointError, LockedError, NoCheckpointError
from dino_exp.fsio import Files

KEEP_ALL = KeepAny((LatestN(100),))


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    manager = save_steps(tmp_path / "checkpoints", [1, 2, 3])
    state = ToyState()
    restored = open_manager(tmp_path / "checkpoints").restore(state)
    assert state.is_of_step(3)
    assert (restored.manifest.step, restored.lost_steps, restored.quarantined) == (3, 0, ())
    assert manager.latest_step() == 3


def test_an_empty_folder_has_nothing_to_restore(tmp_path: Path) -> None:
    manager = open_manager(tmp_path / "checkpoints")
    assert manager.latest_step() is None
    assert manager.best() is None
    with pytest.raises(NoCheckpointError, match="no checkpoint 'latest'"):
        manager.restore(ToyState())
    with pytest.raises(NoCheckpointError, match="no checkpoint 'best'"):
        manager.restore(ToyState(), at="best")


def test_retention_drops_with_reasons(tmp_path: Path) -> None:
    events = Events()
    manager = save_steps(tmp_path / "c", range(1, 9), on_event=events)
    assert [info.step for info in manager.infos()] == [2, 7, 8]  # best of equals is the earliest, 25% is the same
    assert events.of("dropped")[0] == {"step": 1, "reason": "drop: older than last 2, rank 2 by knn_top1"}
    assert len(list((tmp_path / "c" / "packs").iterdir())) == 3
    assert [fields["step"] for fields in events.of("saved")] == [*range(1, 9)]


def test_best_latest_and_milestone_may_be_one_checkpoint(tmp_path: Path) -> None:
    """Trap: a best one under a name of its own is later overwritten, or missing from the list of the latest."""
    keep = KeepAny((LatestN(1), BestN("knn_top1"), Milestones((milestone_from_text("100%"),))))
    manager = open_manager(tmp_path, keep=keep)
    for step in range(1, 9):
        manager.save(ToyState(step), request(step, metrics={"knn_top1": step / 10}))
    (row,) = CheckpointReader(tmp_path).rows()
    assert (row["step"], row["kinds"]) == (8, ["latest", "best", "milestone"])
    for at in ("latest", "best", 8):
        state = ToyState()
        manager.restore(state, at=at)
        assert state.is_of_step(8)


def test_worse_metrics_after_a_resume_leave_the_best(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    manager = open_manager(tmp_path, attempt=2)
    for step, value in ((2, 0.8), (3, 0.1), (4, math.nan), (5, 0.2), (6, 0.3)):
        manager.save(ToyState(step), request(step, metrics={"knn_top1": value}))
        manager = open_manager(tmp_path, attempt=step)
    best = manager.best()
    assert best is not None
    assert best.step == 2


def test_only_the_named_metric_counts(tmp_path: Path) -> None:
    """Trap: metrics compared under one key while another is written."""
    manager = open_manager(tmp_path, keep=KeepAny((BestN("val_loss", "min"),)))
    manager.save(ToyState(1), request(1, metrics={"loss": 0.1, "val_loss": 5.0}))
    manager.save(ToyState(2), request(2, metrics={"loss": 0.9, "val_loss": 4.0}))
    manager.save(ToyState(3), request(3, metrics={"loss": 0.0}))
    best = manager.best()
    assert best is not None
    assert best.step == 2


def test_collapsed_states_are_never_best_and_the_last_healthy_one_stays(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep=KeepAny((LatestN(1), BestN("knn_top1"))))
    manager.save(ToyState(1), request(1, metrics={"knn_top1": 0.5}))
    manager.save(ToyState(2), request(2, metrics={"knn_top1": 0.4}))
    for step in (3, 4):
        manager.save(ToyState(step), request(step, metrics={"knn_top1": 0.9}, healthy=False))
    assert [info.step for info in manager.infos()] == [1, 2, 4]
    best = manager.best()
    assert best is not None
    assert best.step == 1


def test_two_reasons_at_one_step_make_one_save(tmp_path: Path) -> None:
    events, commits = Events(), []
    manager = save_steps(tmp_path, [1], on_event=events, on_commit=commits.append)
    manager.save(ToyState(1), request(1, reasons=("signal SIGTERM",)))
    assert manager.infos()[0].reasons == ("every 1 steps",)
    assert len(events.of("saved")) == len(commits) == 1
    assert commits[0].verified
    assert len(list((tmp_path / "packs").iterdir())) == 1


def test_a_guard_prevents_the_commit(tmp_path: Path) -> None:
    allowed = [True, False, True]

    def guard() -> None:
        if not allowed.pop(0):
            raise LockedError("somebody else owns the run")

    manager = save_steps(tmp_path, [1], guard=guard)
    with pytest.raises(LockedError):
        manager.save(ToyState(2), request(2))
    assert manager.latest_step() == 1
    assert len(list((tmp_path / "packs").iterdir())) == 1
    manager.save(ToyState(2), request(2))
    assert manager.latest_step() == 2


def test_a_failed_save_is_raised_and_leaves_the_old_ones(tmp_path: Path) -> None:
    """Trap: the exception of a failed save is swallowed."""
    manager = save_steps(tmp_path, [1])
    state = ToyState(2)
    state.values["bad"] = {1, 2}
    with pytest.raises(CheckpointError, match="bad: found set"):
        manager.save(state, request(2))
    state.values["bad"] = math.nan
    with pytest.raises(CheckpointError, match="bad: found float"):
        manager.save(state, request(2))
    assert [row["step"] for row in CheckpointReader(tmp_path).rows()] == [1]
    assert len(list((tmp_path / "packs").iterdir())) == 1


def test_an_interrupt_in_the_serializer_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(ToyState):
        def state_dict(self) -> dict[str, Any]:
            raise KeyboardInterrupt

    manager = save_steps(tmp_path, [1])
    with pytest.raises(KeyboardInterrupt):
        manager.save(Interrupted(2), request(2))
    assert manager.latest_step() == 1
    manager.save(ToyState(2), request(2))
    assert CheckpointReader(tmp_path).verify()["ok"]


def test_an_interrupt_after_the_rename_is_a_commit(tmp_path: Path) -> None:
    class Interrupting(Files):
        armed = False

        def sync_dir(self, path: Path) -> None:
            if self.armed and path == tmp_path and (tmp_path / "step-000000002.json").exists():
                self.armed = False
                raise KeyboardInterrupt
            super().sync_dir(path)

    files = Interrupting()
    manager = save_steps(tmp_path, [1], files=files)
    files.armed = True
    with pytest.raises(KeyboardInterrupt):
        manager.save(ToyState(2), request(2))
    manager.save(ToyState(2), request(2))  # the emergency save of the same step
    assert manager.latest_step() == 2
    assert CheckpointReader(tmp_path).verify()["ok"]


def test_leftovers_are_swept_and_nothing_else(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    for name in (
        ".step-000000003.json.tmp",
        ".trash-step-000000001.json",
        "packs/step-000000003.a001.r00000.safetensors",
    ):
        (tmp_path / name).write_bytes(b"torn")
    for name in ("notes.txt", "old-step-5.bak", "step-5.json", "packs/mine.safetensors"):
        (tmp_path / name).write_bytes(b"of the user")
    events = Events()
    manager = open_manager(tmp_path, on_event=events)
    (told,) = events.of("swept")
    assert len(told["names"]) == 3
    assert [info.step for info in manager.infos()] == [1, 2]
    assert (tmp_path / "old-step-5.bak").exists()
    assert (tmp_path / "packs" / "mine.safetensors").exists()


def test_no_pack_is_swept_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    flip(tmp_path / "step-000000002.json", 3)
    open_manager(tmp_path)
    assert pack_of(tmp_path, 2).exists()


def test_the_registry_may_be_deleted_damaged_or_stale(tmp_path: Path) -> None:
    save_steps(tmp_path / "a", [1, 2, 3])
    reference = [{**row, "verified": False} for row in CheckpointReader(tmp_path / "a").rows()]
    registry = (tmp_path / "a" / "registry.json").read_bytes()

    def rows() -> list[Any]:
        return [{**row, "verified": False} for row in CheckpointReader(tmp_path / "a").rows()]

    for content in (None, b"", b"{}", registry[:-10], b"[" * 10_000):
        (tmp_path / "a" / "registry.json").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "a" / "registry.json").write_bytes(content)
        assert rows() == reference
        open_manager(tmp_path / "a")
        assert (tmp_path / "a" / "registry.json").exists()
        assert rows() == reference
    save_steps(tmp_path / "b", [1])
    shutil.copy(tmp_path / "b" / "registry.json", tmp_path / "a" / "registry.json")
    assert rows() == reference
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert open_manager(tmp_path / "moved").restore(ToyState()).manifest.step == 3


def test_checkpoints_deleted_by_hand_are_gone(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    (tmp_path / "step-000000003.json").unlink()
    assert [row["step"] for row in CheckpointReader(tmp_path).rows()] == [2]
    manager = open_manager(tmp_path)
    assert manager.restore(ToyState()).manifest.step == 2
    assert len(list((tmp_path / "packs").iterdir())) == 1


def test_pinned_steps_stay_and_unreadable_pins_drop_nothing(tmp_path: Path) -> None:
    events = Events()
    manager = save_steps(tmp_path, [1], on_event=events)
    save_pins(tmp_path, {1: "for the paper"})
    for step in (2, 3, 4, 5):
        manager.save(ToyState(step), request(step))
    assert [info.step for info in manager.infos()] == [2, 4, 5]  # pinning needs the rule
    manager = open_manager(tmp_path, attempt=2, on_event=events)
    (tmp_path / "pins.json").write_bytes(b"{")
    manager.save(ToyState(6), request(6))
    assert len(list(tmp_path.glob("step-*.json"))) == 4
    assert "Put it back" in events.of("trouble")[0]["error"]


def test_no_clock_orders_checkpoints(tmp_path: Path) -> None:
    times = iter([4e9, 3e9, 2e9, 1e9, 0.0])
    manager = save_steps(tmp_path, [1, 2, 3, 4], clock=lambda: next(times), keep=KeepAny((LatestN(1),)))
    assert [info.step for info in manager.infos()] == [4]


def test_a_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "packs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCheckpointError, match="is a link"):
        open_manager(tmp_path / "c")


def test_a_shared_pack_outlives_the_step_that_wrote_it(tmp_path: Path) -> None:
    """As incremental checkpoints do, which refer to packs of earlier steps."""
    manifest = saved_manifest(tmp_path, 1)
    (tmp_path / "step-000000005.json").write_bytes(manifest_to_bytes(replace(manifest, step=5)))
    ledger = Ledger(tmp_path, keep=KeepAny(()), files=quick_files())
    ledger.apply(RetentionPlan(keep=(5,), drop=(1,), reasons={1: "drop: for this test"}))
    assert [info.step for info in ledger.infos()] == [5]
    assert CheckpointReader(tmp_path).verify()["ok"]
    with pytest.raises(CheckpointError, match="belongs to another checkpoint"):
        open_manager(tmp_path, attempt=1).save(ToyState(1), request(1))
    assert CheckpointReader(tmp_path).verify()["ok"]


def test_library_generators_come_back(tmp_path: Path) -> None:
    """Trap: `if state.get("rng")` on a tensor; python's and numpy's never saved."""

    def draw() -> list[Any]:
        return [random.gauss(0, 1), random.random(), np.random.standard_normal(), *torch.rand(3).tolist()]

    random.gauss(0, 1)  # leaves half a pair behind, which belongs to the state
    np.random.standard_normal()
    manifest = saved_manifest(tmp_path, 1)
    expected = draw()
    draw()
    assert restore_generators(manifest)
    assert draw() == expected
    assert not restore_generators(manifest, rank=1)


def test_generators_do_not_count_for_the_state_digest(tmp_path: Path) -> None:
    first = saved_manifest(tmp_path / "a", 1)
    torch.rand(1)
    second = saved_manifest(tmp_path / "b", 1, attempt=4, clock=lambda: 5.0)
    assert first.state_digest == second.state_digest
    assert first.generators != second.generators
    third = saved_manifest(tmp_path / "c", 2)
    assert third.state_digest != first.state_digest


def test_due_asks_the_save_policy(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, save=EverySteps(4))
    assert manager.due(SaveContext(step=4, schedule=SCHEDULE)) == ("every 4 steps",)
    assert manager.due(SaveContext(step=5, schedule=SCHEDULE)) == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"step": -1},
        {"step": 10**9},
        {"record": {"a": (1, 2)}},
        {"record": {1: 2}},
        {"aside": {"a": math.inf}},
        {"metrics": {"loss": torch.tensor(1.0)}},
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        request(**({"step": 1} | fields))


def test_what_cannot_be_a_tensor_of_a_state(tmp_path: Path) -> None:
    manager = open_manager(tmp_path)
    state = ToyState(1)
    state.tensors["sparse"] = torch.eye(2).to_sparse()
    with pytest.raises(CheckpointError, match="sparse"):
        manager.save(state, request(1))
    state.tensors = {"__metadata__": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="cannot name"):
        manager.save(state, request(1))


def test_a_schedule_needs_steps() -> None:
    with pytest.raises(Exception, match="at least 1 step"):
        Schedule(0, 1)
