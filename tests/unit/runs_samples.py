"""A run record to test with."""

from dino_exp.runs.record import AttemptRecord, CodeRef, RunRecord, Schedule

CONFIG_HEX, CODE_HEX = "ab" * 32, "cd" * 32
KEY = "vit_nano-abababab-cdcdcdcd"
CODE = CodeRef(id=CODE_HEX, commit="0" * 40, dirty=False)


def sample_attempt(number: int = 1, started_at: str = "2026-01-01T00:00:00Z", **changes) -> AttemptRecord:
    return AttemptRecord(number=number, started_at=started_at, host="here", pid=7, code=CODE, **changes)


def sample_record(**changes) -> RunRecord:
    values = {
        "run_key": KEY,
        "config_hash": f"c1:{CONFIG_HEX}",
        "group_hash": "g1:" + "ef" * 32,
        "code": CODE,
        "schedule": Schedule(horizon_steps=100, steps_per_epoch=10),
        "state": "running",
        "attempts": (sample_attempt(),),
    }
    return RunRecord(**(values | changes))
