"""Runs with logs, and what of a run must come back from its backup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cli_samples import KEEP
from support.checkpoints import save_steps

from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.reader import CheckpointReader

LOGS = {"metrics.jsonl": '{"step": 1}\n', "train.log": "hello\n", ".hydra/config.yaml": "seed: 0\n"}


def with_logs(run: Path) -> Path:
    for name, text in LOGS.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    return run


def stored(there: Path, pattern: str) -> Path:
    (found,) = there.rglob(pattern)
    return found


def copied(run: Path) -> dict[str, bytes]:
    """What must come back: everything but the locks, the registry and what lies in quarantine."""
    apart = ("lock", "owner.json", "checkpoints/registry.json", "checkpoints/pins.lock")
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in apart and "quarantine" not in name}


def save_with_rows(run: Path, step: int, num_bytes: int) -> None:
    save_steps(run / "checkpoints", [step], keep=KEEP)
    manifest = CheckpointReader(run / "checkpoints").manifest(step)
    aside = {**manifest.aside, "metrics_rows": 2, "metrics_bytes": num_bytes}
    (run / "checkpoints" / f"step-{step:09d}.json").write_bytes(manifest_to_bytes(replace(manifest, aside=aside)))


def thin(run: Path, step: int) -> None:
    """As `prune --thin` leaves it: it cannot be resumed from any more."""
    manifest = CheckpointReader(run / "checkpoints").manifest(step)
    (run / "checkpoints" / f"step-{step:09d}.json").write_bytes(manifest_to_bytes(replace(manifest, resumable=False)))
