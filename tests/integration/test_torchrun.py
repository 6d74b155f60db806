"""torchrun itself: the command that users type, restarts after a killed rank, and replays by as many processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import SMOKE, Lab, assert_same_end, events, record, rows

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    made = Lab(tmp_path, settings=(*SMOKE, "checkpoint.save.every_steps=4"))
    # torch's launcher warns of itself; what our program warns of is still an error.
    made.environment["PYTHONWARNINGS"] = "default"
    return made


def torchrun(lab: Lab, *overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*TORCHRUN, *options, "-m", "dino_exp.train", *lab.command(*overrides)[3:]]
    return subprocess.Popen(
        command, cwd=lab.directory, env=lab.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    return printed


def rank_of(launcher: int, rank: int) -> int:
    """The number of a rank's process, which is a child of its launcher."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended meanwhile
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(path.name)
    raise AssertionError(f"no rank {rank} below {launcher}")


@pytest.mark.slow
def test_the_command_under_torchrun_prints_and_records_once(lab: Lab) -> None:
    printed = finish(torchrun(lab))
    assert printed.count("Attempt 1: start") == 1
    run = lab.only_run()
    assert record(run)["state"] == "completed"
    assert record(run)["numerics"]["world_size"] == 2
    assert (run / "train.rank1.log").read_text().count("rank 1 of 2") == 1
    assert "Nothing was touched" in finish(torchrun(lab))
    told = json.loads(lab.cli("checkpoints", "show", str(run), "--json"))
    assert len(told["packs"]) == 2
    lab.cli("runs", "reproduce", str(run), "--verify", "8")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_restarts_after_a_killed_rank_and_the_run_ends_in_the_same_bits(rank: int, lab: Lab) -> None:
    finish(torchrun(lab, "run.variant=reference"))
    reference = lab.only_run()
    process = torchrun(lab, "run.variant=killed", options=("--max-restarts", "3"))
    run = reference.with_name(reference.name.replace("reference", "killed"))
    until = time.monotonic() + 60
    while not (run / "events.jsonl").exists() or not events(run, "saved"):
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(rank_of(process.pid, rank), signal.SIGKILL)
    finish(process)
    assert_same_end(run, reference)
    assert len(record(run)["attempts"]) >= 2
    assert [row["step"] for row in rows(run)] == list(range(len(rows(run))))


@pytest.mark.slow
def test_torchrun_that_is_stopped_saves_and_goes_on_with_fewer(lab: Lab) -> None:
    process = torchrun(lab)
    run = lab.run_with_a_save()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert record(run)["state"] in ("preempted", "completed")
    lab.environment["PYTHONWARNINGS"] = "error"
    lab.train()
    assert record(run)["state"] == "completed"
    assert "world_size was 2, is 1 (every step still sees the same images)" in (run / "train.log").read_text()


@pytest.mark.slow
def test_a_sweep_in_every_rank_is_refused(lab: Lab) -> None:
    process = torchrun(lab, "--multirun", "seed=0,1")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "every rank would run the whole sweep" in printed
    assert not lab.outputs.exists()
