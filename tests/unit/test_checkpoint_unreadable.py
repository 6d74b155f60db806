"""Checkpoints that cannot be read, disks that take nothing: what is said, and that the rest goes on."""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_samples import cli, make_run
from support.checkpoints import KEEP, FaultyFiles, ToyState, flip, open_manager, pack_of, request, save_steps

from dino_exp.attempts.target import refuse_older
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.policies import AtEnd, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import Schedule
from dino_exp.errors import CheckpointError, CorruptCheckpointError, RefusedError, SaveFailedError
from dino_exp.fsio import Files, ReadHandle
from dino_exp.runs.layout import RunPaths

ALL = KeepAny((LatestN(99),))


def tear(folder: Path, step: int) -> None:
    path = folder / f"step-{step:09d}.json"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("index", ["with the index", "without it"])
def test_latest_never_means_an_older_one_in_silence(tmp_path: Path, index: str) -> None:
    run = make_run(tmp_path, 1, 2, 3)
    tear(run / "checkpoints", 3)
    if index == "without it":
        (run / "checkpoints" / "registry.json").unlink()
    for words in (("show", f"{run}@latest"), ("verify", f"{run}@latest"), ("pin", f"{run}@latest"), ("show", run)):
        told = cli(*words)
        assert told.code == 4, words
        assert "the newest checkpoint, that of step 3, cannot be read" in told.err
        assert f"{run}@2" in told.err
    assert cli("show", f"{run}@2").code == 0


def test_a_resume_of_the_newest_that_can_be_read_is_no_older_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 3)
    tear(run / "checkpoints", 3)
    refuse_older(RunPaths(run), "2")
    with pytest.raises(RefusedError, match="not the newest"):
        refuse_older(RunPaths(run), "1")


def test_best_passes_over_what_cannot_be_read_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make = make_run(tmp_path, 1, 2, 3, 4) / "checkpoints"
    assert CheckpointReader(make).resolve("best") == 2
    assert not caplog.records
    tear(make, 2)
    with caplog.at_level(logging.WARNING):
        assert CheckpointReader(make).resolve("best") == 1
    assert "step 2 cannot be read, so best means the best of the others" in caplog.text


class OneBadSector(Files):
    """The pack of one step cannot be read."""

    def __init__(self, step: int) -> None:
        self.name = f"step-{step:09d}."

    def open_read(self, path: Path) -> ReadHandle:
        if path.name.startswith(self.name) and path.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return super().open_read(path)


def test_what_cannot_be_read_hides_no_damage(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=ALL)
    reader = CheckpointReader(tmp_path, files=OneBadSector(1))
    with pytest.raises(OSError, match="Input/output error"):  # and nothing else ails it
        reader.verify()
    flip(pack_of(tmp_path, 2))
    found = reader.verify()
    assert (found["ok"], found["checked"]) == (False, 2)
    reasons = {place["step"]: place["reason"] for place in found["damaged"]}
    assert reasons.keys() == {1, 2}
    assert "not checked: [Errno 5]" in reasons[1]


def test_a_checkpoint_of_a_newer_version_hides_no_damage(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 3)
    newer = replace(CheckpointReader(run / "checkpoints").manifest(3), format_version=3)
    (run / "checkpoints" / "step-000000003.json").write_bytes(manifest_to_bytes(newer))
    assert "newer version" in cli("verify", run).err
    flip(pack_of(run / "checkpoints", 1))
    told = cli("verify", run)
    assert told.code == 4
    assert "step 1:" in told.out
    assert "newer version" in told.out


def test_verify_advises_only_what_a_training_can_go_on_from(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1, 2, 3, state="completed")
    checkpoints = run / "checkpoints"
    flip(pack_of(checkpoints, 3))
    assert f"fork={run}@2" in cli("verify", run).out
    manifest = CheckpointReader(checkpoints).manifest(2)
    (checkpoints / "step-000000002.json").write_bytes(manifest_to_bytes(replace(manifest, resumable=False)))
    assert f"fork={run}@1" in cli("verify", run).out
    flip(pack_of(checkpoints, 1))
    assert "none of its checkpoints is good and whole" in cli("verify", run).out


def test_what_needs_no_pins_does_not_ask_for_them(tmp_path: Path) -> None:
    manager = save_steps(tmp_path, [1, 2], keep=ALL)
    (tmp_path / "pins.json").write_text("{}")
    assert manager.healthy_steps() == [1, 2]
    assert manager.reasons_of(2) == ("every 1 steps",)
    assert manager.reasons_of(3) == ()
    with pytest.raises(CorruptCheckpointError):
        manager.infos()


def test_no_second_history_is_saved_beside_the_first(tmp_path: Path) -> None:
    manager = save_steps(tmp_path / "one", [1, 2, 3], keep=ALL)
    state = ToyState()
    assert manager.restore(state, at=2).manifest.step == 2
    for step in (3, 4):
        with pytest.raises(CheckpointError, match="older checkpoint than that of step 3"):
            manager.save(ToyState(step), request(step))
        with pytest.raises(CheckpointError, match="a folder of its own"):
            manager.maybe_save(ToyState(step), request(step))
    CheckpointReader(tmp_path / "one").restore(state, 2)  # as the message says
    assert save_steps(tmp_path / "other", [3], keep=ALL).latest_step() == 3
    manager.restore(state)
    manager.save(ToyState(4), request(4))
    assert [info.step for info in manager.infos()] == [1, 2, 3, 4]


class Unwilling(FaultyFiles):
    """A disk that takes no pack of these steps."""

    def __init__(self, *steps: int) -> None:
        super().__init__(0, once=True)
        self.steps = steps

    def create(self, path: Path) -> Any:
        if path.suffix == ".safetensors" and int(path.name[5:14]) in self.steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().create(path)


@pytest.mark.parametrize("still_writing", [True, False])
def test_a_failure_told_at_the_last_step_costs_no_save_of_it(
    tmp_path: Path, still_writing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = open_manager(tmp_path, files=Unwilling(7), background=True, save=AtEnd())
    manager.save(ToyState(7), request(7))
    while manager.is_saving:
        pass
    if still_writing:  # it ends, and fails, between the look and the wait
        monkeypatch.setattr(manager, "poll", lambda: None)
    with pytest.raises(SaveFailedError, match="step 7"):
        manager.maybe_save(ToyState(8), request(8))
    manifest = manager.drain()
    assert manifest is not None
    assert manifest.step == 8


class NoRoomInQuarantine(FaultyFiles):
    def __init__(self) -> None:
        super().__init__(0, once=True)
        self.is_full = True

    def create(self, path: Path) -> Any:
        if self.is_full and path.name == "reason.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return super().create(path)


def test_a_full_disk_keeps_no_good_checkpoint_from_being_restored(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=ALL)
    flip(pack_of(tmp_path, 3))
    files = NoRoomInQuarantine()
    manager = open_manager(tmp_path, keep=KEEP, files=files, attempt=2)
    state = ToyState()
    restored = manager.restore(state)
    assert (restored.manifest.step, restored.lost_steps, restored.quarantined) == (2, 1, ())
    assert state.is_of_step(2)
    assert list((tmp_path / "quarantine").iterdir()) == []
    assert manager.latest_step() == 2  # so that step 3 is due again
    files.is_full = False
    assert manager.maybe_save(ToyState(3), request(3))
    assert manager.latest_step() == 3
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["step-000000003.q001"]
    assert CheckpointReader(tmp_path).verify()["ok"]


UNSAVABLE: dict[str, dict[str, Any]] = {
    "a horizon": {"schedule": Schedule(2**60, 100)},
    "an epoch": {"epoch": 10**12},
    "samples": {"samples_seen": 2**51},
    "a reason": {"reasons": ("x" * 1001,)},
    "a number": {"metrics": {"knn_top1": 10**400}},
    "digits": {"metrics": {"knn_top1": 10**5000}},
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_a_request_that_could_not_be_read_back_is_refused_at_once(tmp_path: Path, what: str) -> None:
    fields = UNSAVABLE[what]
    with pytest.raises(CheckpointError, match=r"a save needs|reason|metric"):
        replace(request(1), **fields)


def test_a_manifest_that_nobody_could_read_is_not_committed(tmp_path: Path) -> None:
    class Deep(ToyState):
        def __init__(self, step: int = 0) -> None:
            super().__init__(step)
            self.tensors["student.deep"] = self.tensors["student.weight"].reshape([1] * 16 + [6])

    manager: CheckpointManager = open_manager(tmp_path, background=True)
    for step in (1, 2):
        manager.save(Deep(step), request(step))
        with pytest.raises(CheckpointError, match=r"cannot be saved: .* 16 whole numbers") as caught:
            manager.drain()
        assert not isinstance(caught.value, CorruptCheckpointError)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "registry.json"]


@pytest.mark.parametrize("background", [True, False])
def test_a_sparse_tensor_is_named(tmp_path: Path, background: bool) -> None:
    state = ToyState(1)
    state.tensors["student.sparse"] = state.tensors["student.weight"].to_sparse()
    with pytest.raises(CheckpointError, match=r"student.sparse is of the layout torch.sparse_coo"):
        open_manager(tmp_path, background=background).save(state, request(1))
