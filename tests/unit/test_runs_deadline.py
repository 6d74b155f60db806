from __future__ import annotations

import logging

import pytest

from dino_exp.errors import ConfigError
from dino_exp.runs.deadline import SLURM_END, countdown, deadline_secs

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
GIVEN, GIVEN_SECS = "2027-01-15T10:00:00+01:00", NOW + 3600


@pytest.mark.parametrize(
    ("given", "environ", "found"),
    [
        (None, {}, None),
        (None, {SLURM_END: ""}, None),
        (None, {SLURM_END: "1800000060"}, NOW + 60),
        (GIVEN, {}, GIVEN_SECS),
        (GIVEN, {SLURM_END: "1800000060"}, GIVEN_SECS),
        (GIVEN, {SLURM_END: "soon"}, GIVEN_SECS),  # not even looked at
    ],
)
def test_the_given_end_wins_over_slurms(
    caplog: pytest.LogCaptureFixture, given: str | None, environ: dict[str, str], found: float | None
) -> None:
    assert deadline_secs(given, environ, NOW) == found
    assert caplog.records == []


@pytest.mark.parametrize(
    ("given", "environ", "found", "message"),
    [
        (None, {SLURM_END: "soon"}, None, "SLURM_JOB_END_TIME='soon' is ignored: expected unix seconds"),
        (None, {SLURM_END: "1.8e9"}, None, "expected unix seconds"),
        (None, {SLURM_END: "-5"}, None, "expected unix seconds"),
        (None, {SLURM_END: "9" * 400}, None, "expected unix seconds"),
        (None, {SLURM_END: "١٨٠٠٠٠٠٠٦٠"}, None, "expected unix seconds"),
        (None, {SLURM_END: "0"}, None, "SLURM_JOB_END_TIME=0 has passed"),
        (None, {SLURM_END: "1800000000"}, None, "has passed"),
        ("2027-01-15T08:00:00Z", {}, None, "checkpoint.save.deadline=2027-01-15T08:00:00Z has passed"),
        ("2026-01-15T08:00:00Z", {SLURM_END: "1800000060"}, NOW + 60, "has passed and is ignored"),
    ],
)
def test_what_is_no_end_is_told_once_and_ignored(
    caplog: pytest.LogCaptureFixture, given: str | None, environ: dict[str, str], found: float | None, message: str
) -> None:
    assert deadline_secs(given, environ, NOW) == found
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert message in record.getMessage()
    assert len(record.getMessage()) < 200


def test_a_given_text_that_is_no_moment_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="expected a date and time with zone"):
        deadline_secs("18:00", {}, NOW)


def test_the_time_left_follows_the_clock() -> None:
    readings = iter([NOW, NOW + 100, NOW + 50])
    left = countdown(NOW + 60, lambda: next(readings))
    assert [left(), left(), left()] == [60, -40, 10]
    assert countdown(None, lambda: NOW)() is None
