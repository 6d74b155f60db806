"""Rare mishaps that the state machine found, or that reading the code did: each costs what it must and no more."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import (
    Died,
    Events,
    FaultyFiles,
    GatedFiles,
    ToyState,
    flip,
    no_space,
    open_manager,
    pack_of,
    quick_files,
    request,
    save_steps,
)

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import CheckpointError, NoCheckpointError, SaveFailedError

KEEP = KeepAny((LatestN(2),))


def manifest_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}.json"


def test_retention_goes_on_after_a_manifest_was_removed_by_hand(tmp_path: Path) -> None:
    events = Events()
    manager = save_steps(tmp_path, [1, 2], keep=KEEP, on_event=events)
    manifest_of(tmp_path, 1).unlink()
    for step in (3, 4):
        manager.save(ToyState(step), request(step))
    assert events.of("trouble") == []
    assert [info.step for info in manager.infos()] == [3, 4]
    assert not manifest_of(tmp_path, 2).exists()


def test_what_was_removed_by_hand_is_not_counted(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, [1, 2], keep=KEEP)
    manifest_of(tmp_path, 2).unlink()
    assert [info.step for info in manager.infos()] == [1]
    manager.save(ToyState(3), request(3))
    assert [info.step for info in manager.infos()] == [1, 3]
    assert manager.best() is None


def test_room_for_a_superseding_checkpoint_counts_its_step_once(tmp_path: Path) -> None:
    """A disk that is full for one operation must not cost a checkpoint that the rules keep."""
    save_steps(tmp_path, [1, 2], keep=KEEP)
    files = quick_files()
    manager = open_manager(tmp_path, keep=KEEP, attempt=2, files=files)
    files.error, files.fail_at = no_space, files.num_calls + 9
    with pytest.raises(SaveFailedError):
        manager.save(ToyState(2), request(2), supersede=True)
    assert files.num_calls > files.fail_at
    assert [info.step for info in manager.infos()] == [1, 2]


def test_an_error_after_the_rename_of_a_superseding_checkpoint(tmp_path: Path) -> None:
    """The new one is in its place and not known to be durable: neither it nor the old one may lose its pack."""
    for error_at in range(1, 100):
        folder = tmp_path / f"{error_at}"
        save_steps(folder, [1], keep=KEEP)
        files = quick_files()
        manager = open_manager(folder, keep=KEEP, attempt=2, files=files)
        files.error, files.fail_at = no_space, files.num_calls + error_at
        with contextlib.suppress(SaveFailedError):
            manager.save(ToyState(1), request(1, metrics={"knn_top1": 0.5}), supersede=True)
        struck = files.num_calls >= files.fail_at
        files.error, files.once, files.fail_at = Died, False, files.num_calls + 5
        with contextlib.suppress(Died, CheckpointError):  # the same again, and death in the middle of it
            manager.save(ToyState(1), request(1, metrics={"knn_top1": 0.5}), supersede=True)
        state = ToyState()
        open_manager(folder, attempt=3).restore(state)
        assert state.is_of_step(1)
        if not struck:
            break
    assert error_at > 20


def test_a_checkpoint_that_is_known_to_be_damaged_is_saved_again(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, [1, 2], keep=KEEP)
    flip(pack_of(tmp_path, 2))
    with pytest.raises(NoCheckpointError):
        manager.restore(ToyState(), at=2)
    manager.restore(ToyState(), at=1)
    manager.save(ToyState(2), request(2))
    state = ToyState()
    assert not manager.restore(state).quarantined
    assert state.is_of_step(2)


def test_a_checkpoint_that_was_removed_by_hand_is_saved_again(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, [1, 2], keep=KEEP)
    manifest_of(tmp_path, 2).unlink()
    manager.save(ToyState(2), request(2))
    assert manifest_of(tmp_path, 2).exists()
    assert CheckpointReader(tmp_path).verify() == {"ok": True, "checked": 2, "damaged": []}


def test_no_room_is_made_on_the_word_of_a_checkpoint_that_has_rotted(tmp_path: Path) -> None:
    """The save fails again, and the good one that retention was to drop is all that is left."""

    class Full(FaultyFiles):
        def create(self, path: Path) -> Any:
            raise no_space()

    save_steps(tmp_path, [1, 2], keep=KEEP)
    flip(pack_of(tmp_path, 2))
    manager = open_manager(tmp_path, keep=KEEP, attempt=2, files=Full(0, once=True))
    with pytest.raises(SaveFailedError):
        manager.save(ToyState(3), request(3))
    state = ToyState()
    assert open_manager(tmp_path, attempt=3).restore(state).quarantined == (2,)
    assert state.is_of_step(1)


def test_whoever_was_interrupted_while_waiting_for_a_save_still_has_it_under_way(tmp_path: Path) -> None:
    """Else the next save would put its state over the one that is being written."""
    files = GatedFiles()
    manager = open_manager(tmp_path, keep=KEEP, background=True, files=files)
    manager.save(ToyState(1), request(1))
    assert files.reached.wait(60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the signal may come before the wait)
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            manager.drain()
    finally:
        signal.signal(signal.SIGINT, before)
    assert manager.latest_step() == 1
    threading.Timer(0.1, files.gate.set).start()
    manager.save(ToyState(2), request(2))
    manager.drain()
    for step in (1, 2):
        state = ToyState()
        manager.restore(state, at=step)
        assert state.is_of_step(step)


def test_a_thread_that_cannot_start_is_no_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(_: object) -> None:
        raise RuntimeError("can't start new thread")

    manager = open_manager(tmp_path, keep=KEEP, background=True)
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    with pytest.raises(RuntimeError, match="new thread"):
        manager.save(ToyState(1), request(1))
    monkeypatch.undo()
    assert (manager.drain(), manager.latest_step()) == (None, None)
    manager.save(ToyState(1), request(1))
    assert manager.drain() is not None


def test_an_index_that_hides_packs_makes_nobody_sweep_them(tmp_path: Path) -> None:
    """Sealed anew by somebody who wants a start to remove what the manifests reach."""
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "registry.json"
    body = unseal(path.read_bytes(), "registry.json")
    for group in body["versions"]:
        for row in group["checkpoints"]:
            row["packs"] = {}
    path.write_bytes(seal(body))
    (tmp_path / "packs" / "step-000000009.a001.r00000.safetensors").write_bytes(b"an orphan")
    manager = open_manager(tmp_path, attempt=2)
    assert sorted(path.name[:14] for path in (tmp_path / "packs").iterdir()) == ["step-000000001", "step-000000002"]
    state = ToyState()
    assert manager.restore(state).manifest.step == 2
    assert state.is_of_step(2)
