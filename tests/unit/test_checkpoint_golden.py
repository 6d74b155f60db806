"""Checkpoints written by the first version of each format must load for ever.

To write the files anew, which only a change before the first release may do: UPDATE_GOLDEN=1 pytest <this file>.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf, BestN, KeepAny, LatestN, Milestones, milestone_from_text
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import Schedule
from dino_exp.checkpoint.writing import SaveRequest

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint-v1"
DIGEST = GOLDEN / "state_digest.txt"


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


def write_golden() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    keep = KeepAny((LatestN(3), BestN("knn_top1"), Milestones((milestone_from_text("50%"),))))
    manager = CheckpointManager(GOLDEN, save=AnyOf(()), keep=keep, attempt=3, clock=lambda: 1_750_000_000.0)
    request = SaveRequest(
        step=12,
        epoch=2,
        schedule=Schedule(24, 6),
        samples_seen=384,
        reasons=("epoch 2", "milestone 50%"),
        metrics={"knn_top1": 0.5, "val_loss": float("nan")},
        record={"config_hash": "c1:" + "ab" * 32, "git_commit": None, "code_id": "cd" * 32, "parent": None},
        aside={"metrics_bytes": 100},
    )
    manager.save(GoldenState(filled=True), request)
    manifest = manager.drain()
    assert manifest is not None
    (GOLDEN / "quarantine").rmdir()
    assert manifest.state_digest is not None
    DIGEST.write_text(manifest.state_digest + "\n")


def test_format_1_loads(tmp_path: Path) -> None:
    if os.environ.get("UPDATE_GOLDEN"):
        write_golden()
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


def test_the_golden_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 20_000
