"""Runs below an outputs folder, with toy checkpoints: milliseconds, and no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runs_samples import CODE_HEX, CONFIG_HEX, sample_record
from support.checkpoints import ToyState, open_manager, request

from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import save_record


def make(outputs: Path, variant: str, *values: float, seed: int = 0, healthy: bool = True, **changes: Any) -> Path:
    """A run with one checkpoint for each value of knn_top1, at steps 1, 2, ..."""
    key = f"vit_nano-{CONFIG_HEX[:8]}-{CODE_HEX[:8]}-{variant}"
    paths = RunPaths(outputs / "runs" / key)
    paths.directory.mkdir(parents=True)
    given = {"state": "stopped", "step": len(values), **changes}
    save_record(paths.run_json, sample_record(run_key=key, variant=variant, **given))
    settings = f'"optimizer":{{"lr":0.001}},"seed":{seed},"train":{{"epochs":{3 + seed}}}'
    paths.canonical_json.write_text(f'{{"augment":{{"global_area":[0.65,1]}},{settings}}}')
    if values:
        manager = open_manager(paths.checkpoints, keep=KeepAny((LatestN(99),)))
        for step, value in enumerate(values, start=1):
            metrics = {"knn_top1": value, "loss": 1 - value}
            manager.save(ToyState(step), request(step, metrics=metrics, healthy=healthy))
    return paths.directory
