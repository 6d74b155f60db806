"""The cluster job that a process belongs to, and whether a scheduler has started it again.

A job that is requeued must go on with the run that it began, even if somebody edited the code meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The name of a job, and how often it was restarted: SLURM (submitit uses it) and torchrun.
_SCHEDULERS = (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))


@dataclass(frozen=True)
class Job:
    """A job's name, which stays the same over restarts, and whether this is a restart."""

    name: str
    restarted: bool


def job_of(environ: Mapping[str, str]) -> Job | None:
    """The job that the environment tells of; None for a process started by hand. A count that is no number is 0."""
    for name, count in _SCHEDULERS:
        if environ.get(name):
            restarts = environ.get(count, "0")
            return Job(f"{name}={environ[name]}", restarts.isdecimal() and int(restarts) > 0)
    return None
