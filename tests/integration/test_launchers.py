"""Sweeps under Hydra launchers that run jobs elsewhere than in the process that the user started."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.runs import Lab, assert_same_end, record, rows


def jobs_of(lab: Lab) -> list[dict[str, object]]:
    return json.loads(lab.cli("sweeps", "show", "last", "--outputs", str(lab.outputs), "--json"))["jobs"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_end_as_they_do_alone_and_a_failed_one_is_told(launcher: str, lab: Lab) -> None:
    words = ("hydra/launcher=" + launcher, "train.batch_size=64,100000,128", "train.stop_after_steps=2")
    printed = lab.train("--multirun", *words, code=1)
    assert "2 new, 1 wrong; by " in printed
    assert [job["state"] for job in jobs_of(lab)] == ["stopped", None, "stopped"]
    alone = Lab(lab.directory / "alone")
    alone.directory.mkdir()
    alone.train("train.batch_size=128", "train.stop_after_steps=2")
    run = alone.only_run()
    assert_same_end(lab.outputs / "runs" / run.name, run)
    good = ("hydra/launcher=" + launcher, "train.batch_size=64,128", "train.stop_after_steps=2")
    assert "every job is finished" in lab.train("--multirun", *good)


@pytest.mark.slow
def test_submitit_requeues_a_preempted_job_which_goes_on_in_its_directory(lab: Lab) -> None:
    lab.train("run.variant=reference")
    reference = lab.only_run()
    words = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30", "run.variant=swept")
    attempt = lab.fork("--multirun", *words)
    run = reference.with_name(reference.name.replace("reference", "swept"))
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(parent_of(record(run)["attempts"][0]["pid"]), signal.SIGUSR2)
    assert attempt.wait() == 0, attempt.output()
    assert [one["outcome"] for one in record(run)["attempts"]] == ["preempted", "completed"]
    assert_same_end(run, reference)
    assert [job["state"] for job in jobs_of(lab)] == ["completed"]


@pytest.mark.slow
def test_the_lines_for_submitit_go_on_after_a_time_limit(lab: Lab) -> None:
    """Those of docs/ranks.md, with two processes of this machine."""
    lab.train("run.variant=reference")
    reference = lab.only_run()
    words = [*lab.settings, f"paths.outputs={lab.outputs}", "run.variant=submitted"]
    page = (Path(__file__).parents[2] / "docs" / "ranks.md").read_text()
    lines = page[page.index("    import submitit") : page.index("    executor.submit(Train())")]
    program = textwrap.dedent(lines)
    for shown, here in (
        ('["model=vit_s"]', repr(words)),
        ('AutoExecutor("jobs")', 'AutoExecutor("jobs", cluster="local")'),
        ("nodes=2, tasks_per_node=8, gpus_per_node=8, slurm_signal_delay_s=120", "tasks_per_node=2, timeout_min=9"),
    ):
        assert shown in program
        program = program.replace(shown, here)
    (lab.directory / "submit.py").write_text(program + "print(executor.submit(Train()).results())\n")
    run = reference.with_name(reference.name.replace("reference", "submitted"))
    environment = {**lab.environment, "PYTHONWARNINGS": "default"}  # submitit warns of itself
    command = [sys.executable, "submit.py"]
    submitted = subprocess.Popen(command, cwd=lab.directory, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(record(run)["attempts"][0]["pid"], signal.SIGUSR2)
    printed, _ = submitted.communicate(timeout=200)
    assert printed.splitlines()[-1] == "[None, None]", printed
    assert [one["outcome"] for one in record(run)["attempts"]] == ["preempted", "completed"]
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(reference)]


def parent_of(pid: int) -> int:
    """The launcher's process, which has started the training."""
    found = re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
