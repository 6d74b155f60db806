"""A sweep's record, plan and report, and `dino-exp sweeps`, without any training."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from catalogue_samples import make
from cli_samples import cli, contents
from runs_samples import CODE_HEX, CONFIG_HEX, sample_attempt

from dino_exp.attempts.target import Target
from dino_exp.config.multirun import Sweep
from dino_exp.config.schema import SweepConfig
from dino_exp.errors import ConfigError, RefusedError, UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record
from dino_exp.sweeps.outcome import differing
from dino_exp.sweeps.plan import plan_jobs
from dino_exp.sweeps.record import JobRecord, SweepRecord, load_sweep, save_sweep, sweep_name, sweep_path
from dino_exp.sweeps.teller import SweepTeller

sweeps = functools.partial(cli, noun="sweeps")
KEY = f"vit_nano-{CONFIG_HEX[:8]}-{CODE_HEX[:8]}"


def job(variant: str, *words: str, **changes: Any) -> JobRecord:
    return JobRecord(overrides=("model=vit_nano", *words), run_key=f"{KEY}-{variant}", state="new", **changes)


def sweep(*jobs: JobRecord, name: str = "first", at: str = "2026-01-01T00:00:00Z") -> SweepRecord:
    return SweepRecord(
        name=name, typed=("seed=0,1",), launcher="BasicLauncher", created_at=at, updated_at=at, jobs=jobs
    )


def test_the_name_is_a_function_of_what_is_swept() -> None:
    name = sweep_name(None, ["seed=0,1", "model=vit_s"])
    assert name == sweep_name(None, ["model=vit_s", "sweep.dry_run=true", "seed=0,1", "paths.outputs=/elsewhere"])
    assert name != sweep_name(None, ["model=vit_s", "seed=0,2"])
    assert sweep_name("mine", ["seed=0,1"]) == "mine"
    with pytest.raises(UsageError, match="expected letters"):
        sweep_path(Path(), "../x")


def test_a_job_that_became_right_replaces_the_wrong_one() -> None:
    wrong = JobRecord(overrides=("x=1", "seed=0"), run_key=None, state=None, problem="no x")
    right = JobRecord(overrides=("seed=0", "x=1", "paths.outputs=there"), run_key="k", state="new")
    assert sweep(right).merged(sweep(wrong, job("b", "seed=1"))).jobs == (right, job("b", "seed=1"))


def test_a_sweep_that_began_meanwhile_keeps_its_jobs(tmp_path: Path) -> None:
    def announced(seed: int) -> Sweep:
        return Sweep(
            typed=(f"seed={seed}",),
            options=(),
            jobs=((f"seed={seed}",),),
            sweeper="BasicSweeper",
            launcher="BasicLauncher",
            settings=SweepConfig(name="both", dry_run=False),
            outputs=tmp_path,
        )

    def refuse(overrides: object) -> Target:
        raise ConfigError(f"not {overrides}")

    first, second = (SweepTeller(refuse, lambda *_: None, lambda _: None, lambda *_: 1) for _ in range(2))
    first.starts(announced(0))
    second.starts(announced(1))
    second.ends([])
    first.ends([])
    record = load_sweep(sweep_path(tmp_path, "both"))
    assert record is not None
    assert sorted(word for one in record.jobs for word in one.overrides) == ["seed=0", "seed=1"]


def test_a_damaged_record_hides_no_other(tmp_path: Path) -> None:
    save_sweep(sweep_path(tmp_path, "first"), sweep(job("a", "seed=0")))
    for name, content in (("a b", "{}"), ("damaged", "{}")):
        folder = tmp_path / "sweeps" / name
        folder.mkdir()
        (folder / "sweep.json").write_text(content)
    listed = sweeps("list", "--outputs", tmp_path, "--json")
    assert (listed.code, [one["name"] for one in listed.json]) == (0, ["first"])
    assert "damaged" in listed.err
    assert "a b" not in listed.err
    assert sweeps("show", "last", "--outputs", tmp_path).code == 0
    assert sweeps("show", "damaged", "--outputs", tmp_path).code == 4


def test_the_record_comes_back_and_damage_is_named(tmp_path: Path) -> None:
    path = sweep_path(tmp_path, "first")
    assert load_sweep(path) is None
    made = sweep(job("a", "seed=0"), JobRecord(overrides=("x=1",), run_key=None, state=None, problem="no x"))
    save_sweep(path, made)
    assert load_sweep(path) == made
    for change in ({"jobs": 3}, {"more": 1}, {"format": "x"}, {"name": None}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        if "format" in change:
            continue
        with pytest.raises(DamagedFileError, match="may be removed"):
            load_sweep(path)
        save_sweep(path, made)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(RefusedError, match="reads 1"):
        load_sweep(path)


def test_another_sweep_of_a_name_keeps_the_jobs_before_it() -> None:
    earlier = sweep(job("a", "seed=0"), job("b", "seed=1"), at="2026-01-01T00:00:00Z")
    merged = sweep(job("b", "seed=1"), job("c", "seed=2"), at="2026-02-02T00:00:00Z").merged(earlier)
    assert [one.run_key for one in merged.jobs] == [f"{KEY}-{variant}" for variant in "bca"]
    assert (merged.created_at, merged.updated_at) == ("2026-01-01T00:00:00Z", "2026-02-02T00:00:00Z")


@pytest.mark.parametrize(
    ("state", "step", "action"),
    [
        ("completed", 100, "skip"), ("stopped", 5, "skip"), ("stopped", 4, "continue"), ("failed", 3, "retry"),
        ("preempted", 3, "continue"), ("running", 3, "continue"),
    ],
)  # fmt: skip
def test_the_plan_follows_the_state_of_the_run(state: str, step: int, action: str, tmp_path: Path) -> None:
    paths = RunPaths(make(tmp_path, "a", state=state, step=step))
    record = load_record(paths.run_json)
    train = SimpleNamespace(stop_after_steps=5, stop_after_epochs=None)
    config = SimpleNamespace(train=train, run=SimpleNamespace(on_code_change="warn"))
    target: Any = SimpleNamespace(paths=paths, record=record, config=config, key=SimpleNamespace(code_id=CODE_HEX))
    (planned,) = plan_jobs([["seed=0"]], lambda _: target)
    assert planned.action == action
    assert planned.run_key == paths.directory.name
    assert planned.num_steps_left == (0 if action == "skip" else 5 - step)


def test_wrong_settings_spoil_no_other_job_and_doubles_are_refused(tmp_path: Path) -> None:
    def find(overrides: Any) -> Any:
        if "seed=1" in overrides:
            raise ConfigError("no seed 1\nand more")
        return SimpleNamespace(
            paths=RunPaths(tmp_path / overrides[0]),
            record=None,
            config=SimpleNamespace(run=SimpleNamespace(on_code_change="warn")),
            key=SimpleNamespace(code_id=CODE_HEX),
        )

    planned = plan_jobs([["seed=0"], ["seed=1"], ["seed=2"]], find)
    assert [one.action for one in planned] == ["new", "wrong", "new"]
    assert [one.run_key for one in planned] == ["seed=0", None, "seed=2"]
    with pytest.raises(RefusedError, match=r"2 jobs of this sweep are the same run, seed=0:\n  seed=0 x\n  seed=0 y\n"):
        plan_jobs([["seed=0", "x"], ["seed=0", "y"]], find)


def test_only_what_differs_is_shown() -> None:
    assert differing([["a=1", "seed=0"], ["a=1", "seed=1"]]) == ["seed=0", "seed=1"]
    assert differing([["a=1", "seed=0"]]) == ["a=1 seed=0"]
    assert differing([]) == []


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    make(tmp_path, "a", state="completed", metrics={"knn_top1": 0.5, "loss": 2.0})
    attempts = (sample_attempt(outcome="failed", error="it broke"),)
    failed = make(tmp_path, "b", state="failed", attempts=attempts, metrics={"knn_top1": 0.7, "loss": 1.0})
    (failed / "FAILED.txt").write_text("Traceback")
    wrong = JobRecord(overrides=("model=vit_nano", "seed=-1"), run_key=None, state=None, problem="no such seed\nmore")
    save_sweep(sweep_path(tmp_path, "first"), sweep(job("a", "seed=0"), job("b", "seed=1"), job("c", "seed=2"), wrong))
    save_sweep(sweep_path(tmp_path, "second"), sweep(job("a", "seed=0"), name="second", at="2026-03-03T00:00:00Z"))
    return tmp_path


def test_list(outputs: Path) -> None:
    before = contents(outputs)
    rows = sweeps("list", "--outputs", outputs, "--json").json
    assert [(row["name"], row["num_jobs"]) for row in rows] == [("second", 1), ("first", 4)]
    assert rows[1]["states"] == {"completed": 1, "failed": 1, "not begun": 2}
    assert "1 completed, 1 failed, 2 not begun" in sweeps("list", "--outputs", outputs).out
    assert contents(outputs) == before
    assert sweeps("list", "--outputs", outputs / "nowhere").out.startswith("no sweep below")
    sweep_path(outputs, "first").write_text("{")
    assert len(sweeps("list", "--outputs", outputs).lines) == 2
    sweep_path(outputs, "second").write_text("{")
    none = sweeps("list", "--outputs", outputs)
    assert (none.code, none.out, none.err.count("not strict JSON")) == (4, "", 2)
    assert sweeps("list", "--outputs", outputs, "--json").json == []


def test_show(outputs: Path) -> None:
    found = sweeps("show", "fi", "--outputs", outputs, "--json").json
    assert [one["state"] for one in found["jobs"]] == ["completed", "failed", None, None]
    assert [one["error"] for one in found["jobs"]] == [None, "it broke", None, "no such seed"]
    assert found["jobs"][1]["command"] == "python -m dino_exp.train model=vit_nano seed=1"
    printed = sweeps("show", "first", "--outputs", outputs).out
    assert f"job 1 again: python -m dino_exp.train model=vit_nano seed=1 (traceback in {outputs}" in printed
    assert "job 3 again" in printed
    assert "job 2 again" not in printed
    assert sweeps("show", "last", "--outputs", outputs, "--json").json["name"] == "second"


@pytest.mark.parametrize("verb", ["show", "resume", "report"])
def test_an_unknown_sweep_is_told_with_those_there_are(verb: str, outputs: Path) -> None:
    found = sweeps(verb, "third", "--outputs", outputs)
    assert (found.code, found.out) == (2, "")
    assert "there are: first, second" in found.err


def test_report(outputs: Path) -> None:
    lines = sweeps("report", "first", "--outputs", outputs).lines
    assert lines[4] == "| seed | knn_top1 | loss | kept | a kill costs at most | state | run |"
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| 1", "| 0", "| 2", "| -1"]
    by_loss = sweeps("report", "first", "--metric", "loss", "--outputs", outputs).lines
    assert by_loss[4].startswith("| seed | loss | knn_top1 | kept |")
    assert "no job has it" in sweeps("report", "first", "--metric", "x", "--outputs", outputs).err


def test_the_report_tells_what_a_policy_keeps_and_what_a_kill_costs(outputs: Path) -> None:
    run = make(outputs, "p", 0.1, 0.2, step=9)
    (run / "events.jsonl").write_text('{"kind": "saved", "step": 1}\n{"kind": "saved", "step": 2}\n')
    save_sweep(sweep_path(outputs, "third"), sweep(job("p", "seed=0"), name="third"))
    (line,) = sweeps("report", "third", "--metric", "knn_top1", "--outputs", outputs).lines[6:]
    assert " MB | 7 steps | stopped | " in line
    (run / "events.jsonl").write_text("{\n")
    (line,) = sweeps("report", "third", "--outputs", outputs).lines[6:]
    assert "cannot be read" in line


def test_pictures(outputs: Path) -> None:
    for name, suffix in (("first", "png"), ("first", "svg")):
        file = outputs / f"{name}.{suffix}"
        assert sweeps("report", name, "--picture", file, "--outputs", outputs).code == 0
        assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    pairs = [job("a", "lr=1", "m=1"), job("b", "lr=1", "m=2"), job("c", "lr=2", "m=1")]
    save_sweep(sweep_path(outputs, "map"), sweep(*pairs, name="map"))
    assert sweeps("report", "map", "--picture", outputs / "map.pdf", "--outputs", outputs).code == 0
    assert "ends in .svg" in sweeps("report", "map", "--picture", outputs / "map.txt", "--outputs", outputs).err
    found = sweeps("report", "second", "--picture", outputs / "x.png", "--outputs", outputs)
    assert "0 settings were swept" in found.err


def test_nothing_has_failed(outputs: Path) -> None:
    assert sweeps("resume", "second", "--failed", "--outputs", outputs).out == "no job of second has failed\n"
