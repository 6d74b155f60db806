"""Checkpoints of a model so small that what is to be measured can be worked out by hand, and runs around them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from runs_samples import sample_record
from support.checkpoints import Named, open_manager, request

from dino_exp.checkpoint.policies import BestN, KeepAny, LatestN, Pinned
from dino_exp.checkpoint.types import Schedule
from dino_exp.config.stored import write_stored
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, save_record

QKV = "backbone.blocks.0.attn.qkv.weight"
PROTOTYPES = "head.last_layer.weight_v"
KEEP = KeepAny((LatestN(9), Pinned(), BestN("knn_top1")))
SCHEDULE = Schedule(horizon_steps=100, steps_per_epoch=10)


def tiny_state(scale: float, *, gap: float = 0.0, moments: bool = True) -> dict[str, torch.Tensor]:
    """A student of which every weight is `scale` times that at 1, and a teacher that is `gap` away in one number.

    At scale 1: the attention is diag(3, 4), norm 5; the prototypes are rows (1, 0), (0, 1), (0, 0), norm √2.
    """
    qkv, prototypes = torch.diag(torch.tensor([3.0, 4.0])), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    made = {f"student.{QKV}": scale * qkv, f"student.{PROTOTYPES}": scale * prototypes}
    teacher = qkv.clone() * scale
    teacher[0, 1] = gap
    made |= {f"teacher.{QKV}": teacher, f"teacher.{PROTOTYPES}": scale * prototypes}
    made |= {"student.head.mlp.1.running_mean": torch.full((2,), 100.0)}  # no weight: nobody learns it
    if moments:
        made |= {
            f"optimizer.{PROTOTYPES}.exp_avg": torch.full((3, 2), 0.5),
            f"optimizer.{PROTOTYPES}.exp_avg_sq": torch.tensor([[4.0, 4.0], [1.0, 1.0], [1e-6, 1e-6]]),
            f"optimizer.{PROTOTYPES}.step": torch.tensor(7.0),
        }
    return made


def save_states(
    folder: Path,
    states: Mapping[int, Mapping[str, torch.Tensor]],
    metrics: Mapping[int, Any] | None = None,
    **options: Any,
) -> None:
    """Commit checkpoints of these states, each 10 steps an epoch."""
    manager = open_manager(folder, **{"keep": KEEP} | options)
    for step, state in states.items():
        given = {"schedule": SCHEDULE} if metrics is None else {"schedule": SCHEDULE, "metrics": metrics[step]}
        manager.save(Named(dict(state)), request(step, **given))
        manager.drain()


def make_run(
    directory: Path,
    states: Mapping[int, Mapping[str, torch.Tensor]] | None = None,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    events: Sequence[Mapping[str, Any]] = (),
    config: Any = None,
    **record: Any,
) -> RunPaths:
    """A run directory with a record, rows, events and checkpoints, as far as they are given."""
    paths = RunPaths(directory)
    directory.mkdir(parents=True)
    made: RunRecord = sample_record(**{"state": "completed", "step": 40, **record})
    save_record(paths.run_json, made)
    if config is not None:
        write_stored(config, directory)
    for path, lines in ((paths.metrics, rows), (paths.events, events)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if states:
        save_states(paths.checkpoints, states)
    return paths


def row(step: int, **metrics: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    return {"step": step, "epoch": step / 10, **metrics, "wall": {"seconds": 1.0, "images_per_sec": 100.0 + step}}
