"""Several processes on CUDA devices: NCCL, device choice, generators of every rank, pinned snapshots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runs import ENVIRONMENT, SMOKE, Lab, last_digest, record, rows

NUM_DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_DEVICES == 0, reason="needs a CUDA device"),
]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    settings = (*SMOKE, "runtime.device=cuda", "checkpoint.save.every_steps=4", "train.stop_after_steps=12")
    hidden = ("CUDA_VISIBLE_DEVICES", "PYTHONWARNINGS")  # first uses of a driver warn of what is not ours
    return Lab(tmp_path, settings, {name: value for name, value in ENVIRONMENT.items() if name not in hidden})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_rank_of_nccl_is_a_training_like_any(parallel: str, lab: Lab) -> None:
    """A world of one process still goes the way of one process."""
    lab.environment.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    lab.train(f"runtime.parallel={parallel}")
    assert record(lab.only_run())["numerics"]["device"] == "cuda"


@pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_devices_train_what_one_trains(parallel: str, lab: Lab) -> None:
    lab.train("run.variant=one")
    for variant in ("two", "again"):
        lab.train_together(2, f"run.variant={variant}", f"runtime.parallel={parallel}")
    one, two, again = (next(run for run in lab.runs() if run.name.endswith(name)) for name in ("one", "two", "again"))
    assert rows(two) == rows(again)
    if parallel == "ddp":
        assert last_digest(two) == last_digest(again)
    for row, other in zip(rows(one), rows(two), strict=True):
        if "loss" in row:
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)


@pytest.mark.skipif(NUM_DEVICES == 0 or NUM_DEVICES >= 64, reason="needs fewer devices than processes")
def test_more_processes_than_devices_are_refused(lab: Lab) -> None:
    printed = lab.train_together(NUM_DEVICES + 1, codes=[2] * (NUM_DEVICES + 1))
    assert "start as many processes as devices" in "".join(printed)
