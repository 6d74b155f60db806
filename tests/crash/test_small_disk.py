"""A real file system that is too small: nothing committed is lost, nothing torn stays, and training goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import ToyState, open_manager, quick_files, request
from support.disks import mount, unmount
from support.runs import RECIPE, Lab, assert_same_end, events, record, rows

from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import SaveFailedError

MEGABYTE = 1_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of five megabytes."""
    folder = tmp_path / "disk"
    mount(folder, 5 * MEGABYTE)
    yield folder
    unmount(folder)


class TwoMegabytes(ToyState):
    """A toy state with 1.9 MB more: two fit on the disk, three do not."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(step)
        self.tensors["student.big"] = torch.full((475_000,), float(step))

    def is_of_step(self, step: int) -> bool:
        return all(torch.equal(self.tensors[name], tensor) for name, tensor in TwoMegabytes(step).tensors.items())


def restored_step(folder: Path) -> int:
    state = TwoMegabytes()
    step = open_manager(folder, attempt=9, files=quick_files()).restore(state).manifest.step
    assert state.is_of_step(step)
    return step


@pytest.mark.parametrize("beside", [True, False])
def test_a_disk_for_two_checkpoints_goes_on_with_two(disk: Path, beside: bool) -> None:
    """The policy wants two, and two beside a third do not fit: the oldest goes early, and every save succeeds."""
    manager = open_manager(disk / "c", keep=KeepAny((LatestN(2),)), background=beside)
    for step in range(1, 8):
        manager.save(TwoMegabytes(step), request(step))
        manager.drain()
    assert [info.step for info in manager.infos()] == [6, 7]
    assert CheckpointReader(disk / "c").verify()["ok"]
    assert restored_step(disk / "c") == 7


def test_a_disk_that_others_have_filled(disk: Path) -> None:
    manager = open_manager(disk / "c", keep=KeepAny((LatestN(1),)), background=True)
    manager.save(TwoMegabytes(1), request(1))
    manager.drain()
    (disk / "other").write_bytes(bytes(2 * MEGABYTE))
    for step in (2, 3):
        manager.save(TwoMegabytes(step), request(step))
        with pytest.raises(SaveFailedError, match="MB free"):
            manager.drain()
    assert [path.name for path in (disk / "c" / "packs").iterdir()] == ["step-000000001.a001.r00000.safetensors"]
    assert restored_step(disk / "c") == 1
    (disk / "other").unlink()
    manager.save(TwoMegabytes(4), request(4))
    assert manager.drain() is not None
    assert restored_step(disk / "c") == 4


def test_a_disk_that_fills_while_a_save_is_written(disk: Path) -> None:
    """The look at the free space is passed by: the disk itself says that it is full, in the middle of a pack."""

    class Hopeful(type(quick_files())):  # type: ignore[misc]
        def free_bytes(self, path: Path) -> int:
            return 1 << 60

    files = Hopeful(0, once=True)
    manager = open_manager(disk / "c", keep=KeepAny((LatestN(1),)), files=files)
    manager.save(TwoMegabytes(1), request(1))
    (disk / "other").write_bytes(bytes(2 * MEGABYTE))
    with pytest.raises(SaveFailedError, match="No space left on device"):
        manager.save(TwoMegabytes(2), request(2))
    assert [path.name for path in (disk / "c" / "packs").iterdir()] == ["step-000000001.a001.r00000.safetensors"]
    assert restored_step(disk / "c") == 1


@pytest.mark.crash
def test_a_training_whose_disk_is_too_small(tmp_path: Path) -> None:
    """Two checkpoints of 2.3 MB do not fit: one is saved, training goes on to its end, and that is no success."""
    lab = Lab(tmp_path, settings=(*RECIPE, "checkpoint.storage.codec=raw"))
    mount(lab.outputs, 4 * MEGABYTE)
    try:
        lab.train("run.variant=small", code=1)
        run = lab.only_run()
        assert record(run)["state"] == "failed"
        assert record(run)["failed_save"]["step"] == 44
        assert "MB free" in record(run)["failed_save"]["error"]
        assert record(run)["step"] == 11
        assert [row["step"] for row in rows(run)] == list(range(45))
        assert [event["step"] for event in events(run, "save_failed")] == [22, 33, 44]
        assert CheckpointReader(run / "checkpoints").verify()["ok"]
        subprocess.run(["mount", "-o", f"remount,size={40 * MEGABYTE}", str(lab.outputs)], check=True)
        lab.train("run.variant=small")
        assert record(run)["state"] == "completed"
        lab.train("run.variant=reference")
        assert_same_end(run, next(other for other in lab.runs() if other != run))
    finally:
        unmount(lab.outputs)
