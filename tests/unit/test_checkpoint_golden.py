"""Checkpoints written by the first version of each format must load for ever.

To write those of the newest format anew, which only a change before its release may do: UPDATE_GOLDEN=1 pytest <this
file>. Those of older formats cannot be made any more.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf, KeepAny, LatestN, Milestones, ThinMilestones, milestone_from_text
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.types import Schedule
from dino_exp.checkpoint.writing import SaveRequest

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint-v1"
DIGEST = GOLDEN / "state_digest.txt"
GOLDEN_2 = GOLDEN.with_name("checkpoint-v2")
STEPS_2, PLAN_2 = (6, 12, 18), Schedule(24, 6)


class GoldenState:
    def __init__(self, filled: bool) -> None:
        scale = 1 if filled else 0
        self.tensors = {
            "student.weight": torch.arange(6.0).reshape(2, 3) * scale,
            "student.half": torch.tensor([1.5, -0.0, float("inf")]).to(torch.bfloat16) * scale,
            "optimizer.step": torch.tensor(7 * scale),
            "optimizer.mask": torch.tensor([bool(scale), False]),
            "loss.empty": torch.empty(0, 4),
        }
        self.values: dict[str, Any] = {
            "loader.position": 96 * scale,
            "best": {"step": 12, "value": 0.5} if filled else None,
        }

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, **self.values}

    def load_state_dict(self, state: Any) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
        self.values = {name: state[name] for name in self.values}


class CodedGoldenState(GoldenState):
    """With tensors that are stored in every way: planes, differences, predictions, not again, for the teacher alone."""

    def __init__(self, filled: bool, step: int = 12) -> None:
        super().__init__(filled)
        scale = 1 if filled else 0
        ramp = (torch.arange(300) * 7919 % 1009 / 1009 - 0.5) * 0.04  # of exact operations: the same everywhere
        self.tensors |= {
            "student.moving": (ramp + 1e-5 * step) * scale,
            "teacher.moving": (ramp + 0.7e-5 * step) * scale,
            "optimizer.moving.exp_avg_sq": ramp.square() * (1 - 1e-3 * step) * scale,
            "student.still": ramp.flip(0) * scale,
        }


def write_golden_2() -> None:
    """Steps 6 (thinned), 12 and 18, the last two written as what changed."""
    shutil.rmtree(GOLDEN_2, ignore_errors=True)
    keep = KeepAny((LatestN(2), Milestones((milestone_from_text("1"),)), ThinMilestones(("teacher.",))))
    storage = Storage(codec="delta", companions={"teacher.": "student."})
    manager = CheckpointManager(
        GOLDEN_2, save=AnyOf(()), keep=keep, storage=storage, clock=lambda: 1_750_000_000.0, background=False
    )
    for step in STEPS_2:
        manager.save(CodedGoldenState(filled=True, step=step), SaveRequest(step=step, epoch=step // 6, schedule=PLAN_2))
    (GOLDEN_2 / "quarantine").rmdir()
    digests = {row["step"]: row["state_digest"] for row in CheckpointReader(GOLDEN_2).rows()}
    (GOLDEN_2 / "state_digests.json").write_text(json.dumps(digests) + "\n")


def test_format_2_loads(tmp_path: Path) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        write_golden_2()
    shutil.copytree(GOLDEN_2, tmp_path / "c")
    reader = CheckpointReader(tmp_path / "c")
    assert reader.verify() == {"ok": True, "checked": 3, "damaged": []}
    digests = json.loads((GOLDEN_2 / "state_digests.json").read_text())
    assert {str(row["step"]): row["state_digest"] for row in reader.rows()} == digests
    assert [row["resumable"] for row in reader.rows()] == [False, True, True]
    chunks = [entry.chunks[0] for entry in reader.manifest(18).tensors.values()]
    assert {chunk.codec for chunk in chunks} == {"raw/1", "zstd/1", "delta/1"}
    assert {len(chunk.bases) for chunk in chunks} == {0, 1, 3}
    for step in STEPS_2:
        expected, found = CodedGoldenState(filled=True, step=step).tensors, reader.load_tensors(step)
        assert found.keys() == {name for name in expected if step > 6 or name.startswith("teacher.")}
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_format_1_loads(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "c")
    reader = CheckpointReader(tmp_path / "c")
    assert reader.verify() == {"ok": True, "checked": 1, "damaged": []}
    (row,) = reader.rows()
    assert row["kinds"] == ["latest", "best", "milestone"]
    assert row["metrics"] == {"knn_top1": 0.5, "val_loss": "nan"}
    assert row["state_digest"] == DIGEST.read_text().strip()
    state, expected = GoldenState(filled=False), GoldenState(filled=True)
    restored = CheckpointManager(tmp_path / "c", save=AnyOf(()), keep=KeepAny(()), attempt=4).restore(state)
    assert restored.manifest.samples_seen == 384
    assert state.values == expected.values
    for name, tensor in expected.tensors.items():
        assert torch.equal(state.tensors[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
        assert torch.equal(state.tensors[name], tensor)


def test_the_same_state_still_has_the_same_digest(tmp_path: Path) -> None:
    """So that digests recorded by an older version can be compared with those of a newer one."""
    manager = CheckpointManager(tmp_path, save=AnyOf(()), keep=KeepAny(()))
    manager.save(GoldenState(filled=True), SaveRequest(step=1, epoch=0, schedule=Schedule(1, 1)))
    manifest = manager.drain()
    assert manifest is not None
    assert manifest.state_digest == DIGEST.read_text().strip()


def test_the_golden_checkpoints_are_small() -> None:
    for folder in (GOLDEN, GOLDEN_2):
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 80_000
