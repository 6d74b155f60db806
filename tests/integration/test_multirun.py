"""`--multirun` with real trainings: planned, recorded, gone on with."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import Lab, last_digest, record

ROOT = Path(__file__).parents[2]
SWEPT = ("--multirun", "seed=0,1", "train.stop_after_steps=3")


def jobs_of(lab: Lab, name: str = "last") -> list[dict[str, object]]:
    return json.loads(lab.cli("sweeps", "show", name, "--outputs", str(lab.outputs), "--json"))["jobs"]


def test_a_dry_run_prints_the_plan_and_makes_nothing(lab: Lab) -> None:
    printed = lab.train(*SWEPT, "sweep.dry_run=true")
    assert [line.split()[2] for line in printed.splitlines() if line.startswith(("0 ", "1 "))] == ["new", "new"]
    assert "sweep.dry_run=true: nothing was done" in printed
    assert not lab.outputs.exists()


def test_a_sweep_in_one_of_several_ranks_is_refused_before_anything_is_made(lab: Lab) -> None:
    lab.environment.update(RANK="1", WORLD_SIZE="2")
    printed = lab.train(*SWEPT, code=2)
    assert "--multirun in rank 1 of 2: every rank would run the whole sweep. Start the sweep without" in printed
    assert "vit_nano" not in printed  # no plan of it either
    assert not lab.outputs.exists()


@pytest.mark.parametrize("name", ["20241124", "1e3", "true"])
def test_a_name_that_looks_like_something_else_is_a_name(lab: Lab, name: str) -> None:
    printed = lab.train(*SWEPT, "sweep.dry_run=true", f"sweep.name={name}", code=0 if name.isdigit() else 2)
    assert ("nothing was done" in printed) == name.isdigit()
    assert "Warning" not in printed
    assert not lab.outputs.exists()


@pytest.mark.slow
def test_a_sweep_lies_where_its_outputs_lead(lab: Lab) -> None:
    place = lab.directory / "a, b"
    lab.environment["PLACE"] = str(place)
    lab.settings = (*lab.settings, "debug=step")
    printed = lab.train("--multirun", "seed=0", "sweep.name=here", "paths.outputs=${oc.env:PLACE}")
    assert f"dino-exp sweeps resume here --outputs '{place}'" in printed
    assert [path.name for path in lab.directory.iterdir()] == ["a, b"]
    assert "every job is finished" in lab.cli("sweeps", "resume", "here", "--outputs", str(place))
    assert [path.name for path in lab.directory.iterdir()] == ["a, b"]


def test_the_same_sweep_again_skips_continues_and_retries(lab: Lab) -> None:
    lab.train("seed=1", "train.stop_after_steps=3")
    printed = lab.train(*SWEPT)
    assert [line.split()[2] for line in printed.splitlines() if line[:2] in ("0 ", "1 ")][:2] == ["new", "skip"]
    assert "2 stopped" in lab.cli("sweeps", "list", "--outputs", str(lab.outputs))
    digests = {run.name: last_digest(run) for run in lab.runs()}
    again = lab.train(*SWEPT)
    assert "every job is finished; nothing was touched" in again
    longer = lab.train("--multirun", "seed=0,1", "train.stop_after_steps=4")
    assert longer.count("  continue  ") == 2
    assert {run.name for run in lab.runs()} == digests.keys()
    alone = Lab(lab.directory / "alone")
    alone.directory.mkdir()
    alone.train("seed=0", "train.stop_after_steps=4")
    (run,) = alone.runs()
    assert last_digest(lab.outputs / "runs" / run.name) == last_digest(run)
    told = (ROOT / "outputs" / "README.md").read_text()
    made = [*lab.outputs.iterdir(), *(path for path in lab.outputs.glob("sweeps/*") if path.is_file())]
    assert [name for path in made if (name := path.relative_to(lab.outputs).as_posix()) not in told] == []


@pytest.mark.slow
def test_a_sweep_goes_past_what_fails_and_says_how_to_go_on(lab: Lab) -> None:
    words = ("train.batch_size=100000,64", "train.stop_after_steps=2", "sweep.name=sizes")
    printed = lab.train("--multirun", *words, code=1)
    assert "1 new, 1 wrong" in printed
    assert "job 0 again: python -m dino_exp.train" in printed
    wrong, good = jobs_of(lab, "sizes")
    assert (wrong["state"], good["state"]) == (None, "stopped")
    assert str(wrong["error"]).startswith("configuration: train.batch_size=100000")
    failed = lab.cli("sweeps", "resume", "sizes", "--failed", "--outputs", str(lab.outputs), code=1)
    assert "0 of 1 job that had failed ended well" in failed
    (lab.runs()[0] / "checkpoints").rename(lab.directory / "aside")
    lab.train("--multirun", "train.batch_size=64", "train.stop_after_steps=4", code=1)
    (job,) = jobs_of(lab)
    assert (job["state"], "no checkpoint is left" in str(job["error"])) == ("failed", True)
    shutil.rmtree(lab.runs()[0] / "checkpoints")  # the attempt that failed has made it anew, empty
    (lab.directory / "aside").rename(lab.runs()[0] / "checkpoints")
    assert lab.cli("sweeps", "resume", "last", "--outputs", str(lab.outputs))
    assert record(lab.only_run())["step"] == 4


@pytest.mark.slow
def test_two_jobs_of_one_run_are_refused(lab: Lab) -> None:
    printed = lab.train("--multirun", "runtime.workers=0,1", "train.stop_after_steps=2", code=3)
    assert "2 jobs of this sweep are the same run" in printed
    assert "run.variant=<name>" in printed
    assert not lab.runs()
    lab.train("--multirun", "runtime.workers=0,1", "run.variant=w${runtime.workers}", "train.stop_after_steps=2")
    assert sorted(run.name.rpartition("-")[2] for run in lab.runs()) == ["w0", "w1"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_job_cleanly_and_the_sweep_with_it(lab: Lab, number: signal.Signals) -> None:
    attempt = lab.fork("--multirun", "seed=0,1")
    deadline = time.monotonic() + 100
    while not (lab.runs() and (lab.runs()[0] / "metrics.jsonl").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    attempt.kill(number)
    assert attempt.wait() == 128 + number
    assert [job["state"] for job in jobs_of(lab)] == ["preempted", None]
    lab.cli("sweeps", "resume", "last", "--outputs", str(lab.outputs))
    assert [job["state"] for job in jobs_of(lab)] == ["completed", "completed"]


def test_the_plan_tells_the_time_by_earlier_runs(lab: Lab, tmp_path: Path) -> None:
    lab.train("seed=0", "train.stop_after_steps=3")
    printed = lab.train("--multirun", "seed=1,2", "train.stop_after_steps=3", "sweep.dry_run=true")
    (line,) = (line for line in printed.splitlines() if line.startswith("sweep "))
    assert line.rpartition("about ")[2] != "unknown"


EXAMPLES = sorted(path.stem for path in (ROOT / "multirun_examples" / "example").glob("*.yaml"))
EXAMPLE = ("--multirun", f"--config-dir={ROOT / 'multirun_examples'}")


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_says_what_it_is_and_has_a_plan(example: str, lab: Lab) -> None:
    head = (ROOT / "multirun_examples" / "example" / f"{example}.yaml").read_text().split("\nhydra:")[0]
    assert f"# Command: python -m dino_exp.train --multirun --config-dir multirun_examples +example={example}\n" in head
    assert re.search(r"^# Time: +\d", head, re.MULTILINE)
    assert re.search(r"^# Result: +\S", head, re.MULTILINE)
    lab.settings = ()
    printed = lab.train(*EXAMPLE, f"+example={example}", "sweep.dry_run=true")
    (line,) = (line for line in printed.splitlines() if line.startswith("sweep "))
    assert re.match(rf"sweep {example}: \d+ new; ", line)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs_at_debug_size(example: str, lab: Lab) -> None:
    lab.settings = ("train.batch_size=512", "train.stop_after_epochs=null", "train.stop_after_steps=1")
    lab.train(*EXAMPLE, f"+example={example}", "runtime.threads=1")
    jobs = jobs_of(lab, example)
    assert [job["state"] for job in jobs] == ["stopped"] * len(jobs)
    again = str(jobs[0]["command"]).replace("python", sys.executable, 1)
    done = subprocess.run(
        again, shell=True, check=True, cwd=lab.directory, env=lab.environment, capture_output=True, text=True
    )
    assert "Nothing to do" in done.stdout
    report = lab.cli("sweeps", "report", example, "--metric", "init_knn_top1", "--outputs", str(lab.outputs))
    assert report.count("| stopped |") == len(jobs)
