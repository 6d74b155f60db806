"""Restoring on real files: damage of every kind costs one checkpoint, and is said aloud."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Events, ToyState, flip, open_manager, pack_of, request, save_steps

from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import CheckpointError, NoCheckpointError
from dino_exp.fsio import Files

KEEP_ALL = KeepAny((LatestN(100),))


def test_a_damaged_pack_costs_one_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3])
    flip(pack_of(tmp_path, 3))
    events, state = Events(), ToyState()
    manager = open_manager(tmp_path, on_event=events, attempt=2)
    restored = manager.restore(state)
    assert state.is_of_step(2)
    assert (restored.lost_steps, restored.quarantined) == (1, (3,))
    (told,) = events.of("quarantined")
    assert told["step"] == 3
    assert "student.half" in told["reason"]
    home = tmp_path / "quarantine" / "step-000000003.q001"
    assert sorted(path.name for path in home.iterdir()) == [
        "reason.json",
        "step-000000003.a001.r00000.safetensors",
        "step-000000003.json",
    ]
    manager.save(ToyState(3), request(3))
    assert CheckpointReader(tmp_path).verify() == {"ok": True, "checked": 2, "damaged": []}


@pytest.mark.parametrize("what", ["truncated", "empty", "deleted", "folder", "link"])
@pytest.mark.parametrize("which", ["pack", "manifest"])
def test_every_kind_of_damage_falls_back(tmp_path: Path, which: str, what: str) -> None:
    folder = tmp_path / "c"
    save_steps(folder, [1, 2, 3])
    path = pack_of(folder, 3) if which == "pack" else folder / "step-000000003.json"
    data = path.read_bytes()
    path.unlink()
    if what in ("truncated", "empty"):
        path.write_bytes(data[: len(data) // 2] if what == "truncated" else b"")
    elif what == "folder":
        path.mkdir()
    elif what == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    state = ToyState()
    manager = open_manager(folder, attempt=2)
    restored = manager.restore(state)
    assert state.is_of_step(2)
    assert restored.quarantined == (() if (which, what) == ("manifest", "deleted") else (3,))
    manager.save(ToyState(4), request(4))
    assert CheckpointReader(folder).verify()["ok"]


def test_too_many_lost_steps_stop_and_move_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 5], keep=KEEP_ALL)
    flip(pack_of(tmp_path, 5))
    for _ in range(2):  # also for the second attempt: the damage is still there to be seen
        manager = open_manager(tmp_path, max_lost_steps=2, keep=KEEP_ALL)
        with pytest.raises(NoCheckpointError, match=r"3 steps would be lost.*max_lost_steps=3"):
            manager.restore(ToyState())
    assert list((tmp_path / "quarantine").iterdir()) == []
    assert open_manager(tmp_path, max_lost_steps=3, keep=KEEP_ALL).restore(ToyState()).lost_steps == 3


def test_when_all_are_damaged_it_stops_aloud(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        flip(tmp_path / f"step-{step:09d}.json", 5)
    manager = open_manager(tmp_path, attempt=2)
    assert manager.latest_step() == 2, "a run whose checkpoints are all damaged must not look new"
    with pytest.raises(NoCheckpointError, match="dino-exp checkpoints verify"):
        manager.restore(ToyState())
    assert len(list((tmp_path / "packs").iterdir())) == 2


def test_a_damaged_step_asked_for_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2], keep=KEEP_ALL)
    flip(pack_of(tmp_path, 1))
    manager = open_manager(tmp_path, keep=KEEP_ALL)
    with pytest.raises(NoCheckpointError, match=r"step 1 is damaged.*Other steps here: 2"):
        manager.restore(ToyState(), at=1)
    with pytest.raises(NoCheckpointError, match="no checkpoint 7"):
        manager.restore(ToyState(), at=7)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_disk_that_does_not_answer_is_not_damage(tmp_path: Path, code: int) -> None:
    class Unreadable(Files):
        def open_read(self, path: Path) -> Any:
            if path.suffix == ".safetensors":
                raise OSError(code, "no answer")
            return super().open_read(path)

    save_steps(tmp_path, [1, 2])
    with pytest.raises(OSError, match="no answer"):
        open_manager(tmp_path, files=Unreadable()).restore(ToyState())
    assert list((tmp_path / "quarantine").iterdir()) == []
    assert open_manager(tmp_path).restore(ToyState()).manifest.step == 2


def test_names_shapes_and_types_must_fit(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, [1])
    state = ToyState()
    state.tensors["student.extra"] = torch.zeros(1)
    state.tensors["student.weight"] = torch.zeros(3, 2)
    state.tensors["student.half"] = torch.zeros(2)
    del state.values["loader.position"]
    with pytest.raises(CheckpointError) as caught:
        manager.restore(state)
    for part in (
        "missing in it: student.extra",
        "unexpected in it: loader.position",
        "student.half is float32[2], saved bfloat16[2]",
        "student.weight is float32[3, 2], saved float32[2, 3]",
    ):
        assert part in str(caught.value)
    assert torch.equal(state.tensors["student.half"], torch.zeros(2)), "nothing was touched"
    assert manager.latest_step() == 1


def test_optional_names_may_be_on_one_side(tmp_path: Path) -> None:
    """An optimizer that has made no step has no moments; absent stays absent."""
    manager = save_steps(tmp_path, [1])
    state = ToyState()
    del state.tensors["optimizer.count"]
    with pytest.raises(CheckpointError, match=r"unexpected in it: optimizer\.count"):
        manager.restore(state)
    manager.restore(state, optional=("optimizer.",))
    assert torch.equal(state.tensors["student.weight"], torch.ones(2, 3))
