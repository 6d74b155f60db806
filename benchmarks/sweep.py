"""What the repeat of a finished sweep costs for each job. `python -m benchmarks.sweep`"""

from __future__ import annotations

import subprocess
import sys
import tempfile

from benchmarks.measure import HEADER, in_pairs, parser_of, seconds_of
from dino_exp.attempts.target import start_target
from dino_exp.config.canonical import config_hash, group_hash
from dino_exp.config.compose import compose
from dino_exp.config.stored import write_stored
from dino_exp.runs.record import AttemptRecord, CodeRef, RunRecord, Schedule, save_record

NUM_JOBS = 100


def main() -> None:
    parser_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = f"paths.outputs={folder}"
        for seed in range(NUM_JOBS):
            finish([f"seed={seed}", place])
        sweep = [sys.executable, "-m", "dino_exp.train", "--multirun", f"seed=range(0,{NUM_JOBS})", place]
        told = subprocess.run(sweep, check=True, capture_output=True, text=True).stdout
        assert "every job is finished" in told, told
        single = [sys.executable, "-m", "dino_exp.train", "seed=0", place]
        pairs = in_pairs(lambda: seconds_of(sweep) / NUM_JOBS, lambda: seconds_of(single), num_pairs=5)
        print(HEADER)
        print(pairs.line(f"a job of {NUM_JOBS}, all finished", "the same job alone", "≤ 0.3 s"))


def finish(overrides: list[str]) -> None:
    """A run of these settings and this code that says that it is completed."""
    target = start_target(compose(overrides))
    target.paths.directory.mkdir(parents=True)
    write_stored(target.config, target.paths.directory)
    code = CodeRef(id=target.key.code_id, commit=None, dirty=None)
    at = "2026-01-01T00:00:00.000000Z"
    attempt = AttemptRecord(number=1, started_at=at, ended_at=at, host="here", pid=1, code=code, outcome="completed")
    save_record(
        target.paths.run_json,
        RunRecord(
            run_key=target.paths.directory.name, config_hash=config_hash(target.config),
            group_hash=group_hash(target.config), code=code, schedule=Schedule(horizon_steps=990, steps_per_epoch=22),
            state="completed", step=990, epochs_done=45, attempts=(attempt,),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
