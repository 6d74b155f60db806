import pytest

from dino_exp.runs.job import Job, job_of


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": ""}, None),
        ({"SLURM_JOB_ID": "7"}, Job("SLURM_JOB_ID=7", False)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}, Job("SLURM_JOB_ID=7", False)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, Job("SLURM_JOB_ID=7", True)),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "x"}, Job("SLURM_JOB_ID=7", False)),
        ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "1"}, Job("TORCHELASTIC_RUN_ID=a", True)),
    ],
)
def test_the_job_and_its_restarts(environ, job):
    assert job_of(environ) == job
