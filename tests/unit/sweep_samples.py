"""Sweeps without any training: their records, and an outputs folder with some."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from catalogue_samples import make
from cli_samples import cli
from runs_samples import CODE_HEX, CONFIG_HEX, sample_attempt

from dino_exp.sweeps.record import JobRecord, SweepRecord, save_sweep, sweep_path

sweeps = functools.partial(cli, noun="sweeps")
KEY = f"vit_nano-{CONFIG_HEX[:8]}-{CODE_HEX[:8]}"


def job(variant: str, *words: str, **changes: Any) -> JobRecord:
    return JobRecord(overrides=("model=vit_nano", *words), run_key=f"{KEY}-{variant}", state="new", **changes)


def sweep(*jobs: JobRecord, name: str = "first", at: str = "2026-01-01T00:00:00Z") -> SweepRecord:
    return SweepRecord(
        name=name, typed=("seed=0,1",), launcher="BasicLauncher", created_at=at, updated_at=at, jobs=jobs
    )


def two_sweeps(tmp_path: Path) -> Path:
    """An outputs folder with a sweep of a completed, a failed, a missing and a wrong job, and another of one."""
    make(tmp_path, "a", state="completed", metrics={"knn_top1": 0.5, "loss": 2.0})
    attempts = (sample_attempt(outcome="failed", error="it broke"),)
    failed = make(tmp_path, "b", state="failed", attempts=attempts, metrics={"knn_top1": 0.7, "loss": 1.0})
    (failed / "FAILED.txt").write_text("Traceback")
    wrong = JobRecord(overrides=("model=vit_nano", "seed=-1"), run_key=None, state=None, problem="no such seed\nmore")
    save_sweep(sweep_path(tmp_path, "first"), sweep(job("a", "seed=0"), job("b", "seed=1"), job("c", "seed=2"), wrong))
    save_sweep(sweep_path(tmp_path, "second"), sweep(job("a", "seed=0"), name="second", at="2026-03-03T00:00:00Z"))
    return tmp_path
