"""A job that its scheduler starts again goes on with the run that it began."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from config_examples import config
from runs_samples import CODE, sample_attempt, sample_record

from dino_exp.attempts.target import existing_or_new
from dino_exp.config.canonical import config_hash
from dino_exp.config.stored import write_stored
from dino_exp.runs.record import save_record


def begun(outputs: Path, digit: str, started_at: str, job: str) -> Path:
    """A run of the default settings, by code of its own."""
    hashed = config_hash(config())
    key = f"vit_nano-{hashed[3:11]}-{digit * 8}"
    run = outputs / "runs" / key
    run.mkdir(parents=True)
    write_stored(config(), run)
    attempt, code = sample_attempt(started_at=started_at, job=job), replace(CODE, id=digit * len(CODE.id))
    save_record(run / "run.json", sample_record(run_key=key, config_hash=hashed, code=code, attempts=(attempt,)))
    return run


def test_of_jobs_of_one_name_that_of_the_newest_attempt_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TORCHELASTIC_RUN_ID=none"  # torchrun without --rdzv-id
    begun(tmp_path, "a", "2026-01-01T00:00:00Z", name)
    newest = begun(tmp_path, "b", "2026-01-03T00:00:00Z", name)
    begun(tmp_path, "c", "2026-01-02T00:00:00Z", name)
    begun(tmp_path, "d", "2026-01-04T00:00:00Z", "SLURM_JOB_ID=none")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    settings = config(f"paths.outputs={tmp_path}")
    assert existing_or_new(settings).paths.directory == newest
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert existing_or_new(settings).record is None
