"""Ten thousand runs on disk, without training any: real records, manifests and registries, of made-up metrics."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch

from dino_exp.checkpoint.layout import manifest_name
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.policies import AnyOf, BestN, EverySteps, KeepAny, LatestN
from dino_exp.checkpoint.policies.kinds import retention_to_json
from dino_exp.checkpoint.registry import row_of, write_registry
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.torch_state import TorchState
from dino_exp.checkpoint.types import Schedule
from dino_exp.checkpoint.writing import SaveRequest
from dino_exp.config.canonical import canonical_text, config_hash, group_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.runs.jsontext import utc_text
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import AttemptRecord, Best, CodeRef, RunRecord, save_record
from dino_exp.runs.record import Schedule as RunSchedule

KEEP = KeepAny((LatestN(99), BestN("knn_top1")))
METRICS = ("loss", "val_loss", "knn_top1", "knn5_top1", "knn_10shot", "knn_1shot", "lr", "grad_norm")


def make_runs(outputs: Path, *, num_runs: int, num_checkpoints: int, first: int = 0) -> None:
    """Runs number `first` and on: of five hundred seeds each of its learning rates, by one of two commits."""
    config = config_from_mapping(compose(["experiment=digits"]))
    schedule = Schedule(horizon_steps=22 * num_checkpoints, steps_per_epoch=22)
    template, model = outputs / "template", torch.nn.Linear(4, 4)
    manager = CheckpointManager(template, save=AnyOf((EverySteps(1),)), keep=KEEP, background=False)
    manager.save(
        TorchState(model, torch.optim.AdamW(model.parameters()), step=22),
        SaveRequest(step=22, epoch=1, schedule=schedule),
    )
    manifest, _ = Store(template).read(22)
    for number in range(first, first + num_runs):
        dice = random.Random(number)
        given = replace(config, seed=number % 500, optimizer=replace(config.optimizer, lr=1e-3 * (1 + number // 500)))
        whole, group = config_hash(given), group_hash(given)
        code = CodeRef(id=f"{number % 2:064x}", commit=f"{number % 2:040x}", dirty=False)
        key = f"vit_nano-{whole[3:11]}-{code.id[:8]}"
        paths = RunPaths(outputs / "runs" / key)
        store = Store(paths.checkpoints)
        paths.directory.mkdir(parents=True)
        store.prepare()
        rows, record = [], {"config_hash": whole, "git_commit": code.commit, "code_id": code.id, "run_key": key}
        for epoch in range(1, num_checkpoints + 1):
            metrics = {name: dice.random() for name in METRICS}
            made = replace(manifest, step=22 * epoch, epoch=epoch, metrics=metrics, record=record)
            (paths.checkpoints / manifest_name(made.step)).write_bytes(manifest_to_bytes(made))
            identity = store.identity(made.step)
            assert identity is not None
            rows.append(row_of(made, identity, verified=True))
        write_registry(store, rows, retention_to_json(KEEP), schedule)
        paths.canonical_json.write_text(canonical_text(given))
        best = max(rows, key=lambda row: row.info.metrics["knn_top1"]).info
        started = AttemptRecord(
            number=1, started_at=utc_text(1.7e9 + 60 * number), host="here", pid=1, code=code, outcome="completed",
            ended_at=utc_text(1.7e9 + 60 * number + 50),
        )  # fmt: skip
        save_record(
            paths.run_json,
            RunRecord(
                run_key=key, config_hash=whole, group_hash=group, code=code, state="completed", attempts=(started,),
                schedule=RunSchedule(horizon_steps=schedule.horizon_steps, steps_per_epoch=22),
                step=schedule.horizon_steps, epochs_done=num_checkpoints, metrics=rows[-1].info.metrics,
                best=Best(step=best.step, metric="knn_top1", value=best.metrics["knn_top1"]),
            ),
        )  # fmt: skip
