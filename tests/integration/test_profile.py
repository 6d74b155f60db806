"""`runtime.profile=true`: where the time of a few steps goes, and not one other number."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from support.runs import Lab, assert_same_end, events, record, rows

from dino_exp.training.phases import PHASES


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def only(lab: Lab, variant: str) -> Path:
    (run,) = (run for run in lab.runs() if run.name.endswith(variant))
    return run


def test_a_profiled_training_ends_in_the_same_bits_and_its_run_stays_healthy(lab: Lab) -> None:
    lab.train("run.variant=plain", "train.stop_after_steps=12")
    printed = lab.train("run.variant=profiled", "train.stop_after_steps=12", "runtime.profile=true")
    plain, run = only(lab, "plain"), only(lab, "profiled")
    assert rows(run) == rows(plain)
    assert_same_end(run, plain)
    assert run.name.removesuffix("profiled") == plain.name.removesuffix("plain")  # the same settings
    assert not (plain / "profile").exists()

    table, trace = run / "profile" / "attempt-001.txt", run / "profile" / "attempt-001.trace.json.gz"
    assert str(table) in printed
    assert "profiler_start" not in printed  # what torch's recorder says of itself
    (event,) = events(run, "profiled")
    assert (event["first"], event["last"], event["table"]) == (4, 8, table.name)
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {*PHASES, "aten::addmm"} <= names

    assert json.loads(lab.cli("checkpoints", "verify", str(run), "--json"))["ok"]
    findings = json.loads(lab.cli("runs", "doctor", "--outputs", str(lab.outputs), "--json"))
    assert [one for one in findings if run.name in one["about"] and one["level"] == "problem"] == []


@pytest.mark.slow
def test_a_profiled_run_is_reproduced_backed_up_and_restored(lab: Lab) -> None:
    lab.train("runtime.profile=true")
    run = lab.only_run()
    assert json.loads(lab.cli("runs", "reproduce", str(run), "--json"))["exact"]
    lab.cli("checkpoints", "backup", str(run), str(lab.directory / "backup"))
    lab.cli("checkpoints", "restore", str(lab.directory / "backup"), str(lab.directory / "restored"))
    assert (lab.directory / "restored" / "run.json").exists()


def test_the_phases_of_a_step_add_up_to_it(lab: Lab) -> None:
    lab.train("runtime.profile=true", "train.stop_after_steps=8", "evaluation.every_epochs=null")
    text = (lab.only_run() / "profile" / "attempt-001.txt").read_text()
    times = {name: float(line.removeprefix(name).split()[0]) for name in PHASES for line in text.splitlines()
             if line.startswith(name)}  # fmt: skip
    assert times.keys() == set(PHASES)
    (total,) = (float(line.split()[2]) for line in text.splitlines() if line.startswith("a step"))
    assert 0.5 * total < sum(times.values()) <= total * 1.001
    assert min(times[name] for name in ("teacher forward", "student forward", "backward")) > 0.05 * total


@pytest.mark.slow
def test_each_attempt_has_a_profile_of_its_own_and_a_short_one_is_profiled_from_its_first_step(lab: Lab) -> None:
    lab.train("runtime.profile=true", "train.stop_after_steps=2")
    run = lab.only_run()
    lab.train("resume=last", "train.stop_after_steps=20")
    assert [(event["first"], event["last"]) for event in events(run, "profiled")] == [(1, 2), (6, 10)]
    assert sorted(path.name for path in (run / "profile").glob("*.txt")) == ["attempt-001.txt", "attempt-002.txt"]


def test_what_leads_out_of_the_run_is_refused(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    (lab.only_run() / "profile").symlink_to(lab.directory)
    assert "is a link" in lab.train("resume=last", "runtime.profile=true", "train.stop_after_steps=9", code=3)
    assert record(lab.only_run())["step"] == 2


def test_a_profile_that_the_disk_does_not_take_stops_no_training(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    (lab.only_run() / "profile").write_text("no folder")
    printed = lab.train("resume=last", "runtime.profile=true", "train.stop_after_steps=12")
    assert "the profile could not be written" in printed
    assert record(lab.only_run())["step"] == 12
