"""A real disk that is full at each page of a save, or altogether: a tmpfs. Skipped where mounting is not allowed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import open_manager, request
from support.disks import mount
from support.runs import Lab, assert_same_end, manifests, record

from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import SaveFailedError
from dino_exp.fsio import Files

PAGE = os.sysconf("SC_PAGESIZE")
KEEP_ALL = KeepAny((LatestN(1000),))
MB = 10**6


class SmallDisk:
    """A mounted tmpfs, and a file on it that takes room away."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"

    @property
    def free_bytes(self) -> int:
        return Files().free_bytes(self.folder)

    def leave(self, num_bytes: int) -> None:
        """Leave so much room and no more, for all files but the ballast."""
        with self.ballast.open("wb") as handle:
            handle.truncate(0)
            os.posix_fallocate(handle.fileno(), 0, max(self.free_bytes - num_bytes, 1))

    def clear(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    folder = tmp_path / "disk"
    mount(folder, getattr(request, "param", 4 * MB))
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Blob:
    """A state of some size, a function of the step."""

    def __init__(self, step: int = 0, num_bytes: int = 15 * PAGE) -> None:
        self.value = torch.arange(num_bytes, dtype=torch.uint8) + step
        self.step = step

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: Any) -> None:
        self.value.copy_(state["value"])
        self.step = state["step"]

    def is_of_step(self, step: int) -> bool:
        return self.step == step and torch.equal(self.value, Blob(step, len(self.value)).value)


class Boastful(Files):
    """A disk that claims more room than it has, as one with quotas or a shared one does: the write itself fails."""

    def free_bytes(self, path: Path) -> int:
        return 10**15


def check_all_good(folder: Path, acknowledged: list[int]) -> None:
    """Every acknowledged step is listed and restores; there is no pack and no temporary file of any other."""
    reader = CheckpointReader(folder)
    assert [row["step"] for row in reader.rows()] == acknowledged
    assert reader.verify()["ok"]
    for step in acknowledged:
        state = Blob()
        reader.restore(state, step)
        assert state.is_of_step(step)
    assert [int(pack.name[5:14]) for pack in sorted((folder / "packs").iterdir())] == acknowledged
    assert not list(folder.glob(".*"))
    assert not list((folder / "quarantine").iterdir())


@pytest.mark.parametrize("files", [Files(), Boastful()], ids=["looks ahead", "finds out"])
def test_a_disk_that_is_full_at_every_page(disk: SmallDisk, files: Files, survived: Callable[[str, int], None]) -> None:
    """The room ends at each page of the pack, of the manifest, of the indexes, until a save finds enough."""
    folder = disk.folder / "checkpoints"
    open_manager(folder, keep=KEEP_ALL).save(Blob(1), request(1))
    outcomes = []
    for num_pages in range(60):
        disk.leave(num_pages * PAGE)
        manager = open_manager(folder, keep=KEEP_ALL, attempt=num_pages + 2, files=files)
        try:
            manager.save(Blob(2), request(2))
        except SaveFailedError:
            check_all_good(folder, [1])
            outcomes.append(False)
            continue
        check_all_good(folder, [1, 2])
        outcomes.append(True)
        break
    assert outcomes == [False] * (len(outcomes) - 1) + [True]
    assert len(outcomes) > 15
    survived("disks that were full at another page", len(outcomes) - 1)


@pytest.mark.crash
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("disk", [400 * MB], indirect=True)
def test_a_training_whose_disk_another_fills_up(disk: SmallDisk, lab: Lab) -> None:
    """Not a byte is left after the first checkpoint: not for rows, events or records either."""
    lab.train("run.variant=reference")
    reference = lab.only_run()
    small = Lab(disk.folder)
    small.train("run.variant=small", "train.stop_after_steps=11")
    run = small.only_run()
    before = manifests(run)
    disk.leave(0)
    printed = small.train("run.variant=small", code=1)
    assert "Traceback" not in printed
    assert f"{run}/" in printed  # the file is named
    assert "No space left on device" in printed
    assert manifests(run) == before
    disk.clear()
    small.train("run.variant=small")
    assert record(run)["state"] == "completed"
    assert_same_end(run, reference)
