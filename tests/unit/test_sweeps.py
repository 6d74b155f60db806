"""A sweep's record and plan, without any training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from catalogue_samples import make
from runs_samples import CODE_HEX, sample_attempt
from sweep_samples import KEY, job, sweep, sweeps

from dino_exp.attempts.target import Target
from dino_exp.config.multirun import Sweep
from dino_exp.config.schema import SweepConfig
from dino_exp.errors import CompositionError, ConfigError, RefusedError, UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import Schedule, load_record
from dino_exp.sweeps.outcome import differing, outcomes_of
from dino_exp.sweeps.plan import plan_jobs
from dino_exp.sweeps.record import JobRecord, load_sweep, save_sweep, sweep_name, sweep_path
from dino_exp.sweeps.teller import Paces, SweepTeller


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


def announced(outputs: Path, *jobs: list[str], **changes: Any) -> Sweep:
    return Sweep(
        typed=("seed=0,1",), jobs=tuple(map(tuple, jobs)), sweeper="BasicSweeper", launcher="BasicLauncher",
        settings=SweepConfig(name="both", dry_run=False), outputs=outputs, **{"options": (), **changes},
    )  # fmt: skip


def teller(find: Any, told: list[str] | None = None) -> SweepTeller:
    return SweepTeller(find, lambda *_: None, ([] if told is None else told).append, lambda *_: 1)


def target_in(directory: Path, outputs: Path) -> Any:
    config = SimpleNamespace(
        paths=SimpleNamespace(outputs=str(outputs)), run=SimpleNamespace(on_code_change="warn"),
        train=SimpleNamespace(stop_after_steps=5, stop_after_epochs=None, epochs=1, batch_size=64),
        model=SimpleNamespace(name="vit_nano"), data=SimpleNamespace(name="digits"),
    )  # fmt: skip
    paths = RunPaths(directory)
    record = load_record(paths.run_json)
    return SimpleNamespace(
        paths=paths, record=record, config=config, key=SimpleNamespace(code_id=CODE_HEX), parent=None
    )


@pytest.fixture(autouse=True)
def any_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_exp.sweeps.teller.group_hash", lambda config: "g1:")
    monkeypatch.setenv("DINO_EXP_SWEEP", "")  # set by a sweep that begins, and put back after each test
    monkeypatch.delenv("DINO_EXP_SWEEP")


def test_what_hydra_cannot_compose_ends_the_sweep_before_anything_is_written(tmp_path: Path) -> None:
    def find(overrides: Any) -> Any:
        if "model=vit_typo" in overrides:
            raise CompositionError("configuration: model=vit_typo: there is no such choice")
        assert overrides[0] == "hydra.searchpath=[here]"
        return target_in(tmp_path / "runs" / "a", tmp_path)

    told: list[str] = []
    asked = announced(tmp_path, ["model=vit_nano"], ["model=vit_typo"], options=("hydra.searchpath=[here]",))
    says = r"1 of 2 jobs cannot be composed.*\n  job 1: .+no such choice\nNothing was"
    with pytest.raises(CompositionError, match=says):
        teller(find, told).starts(asked)
    assert told == ["sweep both: 1 new, 1 wrong; by BasicLauncher; one after the other about unknown"]
    assert not (tmp_path / "sweeps").exists()


def test_a_file_that_cannot_be_looked_at_spoils_one_job(tmp_path: Path) -> None:
    def find(overrides: Any) -> Any:
        if overrides == ("a",):
            (tmp_path / ("a" * 300)).stat()
        return target_in(tmp_path / "runs" / "b", tmp_path)

    wrong, good = plan_jobs([["a"], ["b"]], find)
    assert (wrong.action, good.action, wrong.composes) == ("wrong", "new", True)
    assert wrong.reason.endswith("aaa: File name too long")


def test_a_sweep_lies_in_one_folder(tmp_path: Path) -> None:
    def find(overrides: Any) -> Any:
        return target_in(tmp_path / overrides[0] / "runs" / "a", tmp_path / overrides[0])

    with pytest.raises(ConfigError, match=rf"paths.outputs: found {tmp_path}/two for job 1 and {tmp_path}/one for"):
        teller(find).starts(announced(tmp_path / "one", ["one"], ["two"]))
    assert not list(tmp_path.iterdir())


def test_runs_elsewhere_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make(tmp_path / name, "a", state="completed", step=100) for name in ("one", "two")]
    here = tmp_path / "here"
    make(here, "b", state="preempted", step=3)

    def find(overrides: Any) -> Any:
        number = int(overrides[0].partition("=")[2])
        return target_in([*made, here / "runs" / f"{KEY}-b"][number], here if number == 2 else tmp_path)

    watcher = teller(find)
    assert watcher.starts(announced(here, ["resume=0"], ["resume=1"], ["seed=2"])) is None
    assert watcher.ends([0, 0, 0]) == 1
    record = load_sweep(sweep_path(here, "both"))
    assert record is not None
    assert [one.directory for one in record.jobs] == [*map(str, made), None]
    assert [one.state for one in outcomes_of(record, here)] == ["completed", "completed", "preempted"]
    monkeypatch.setenv("DINO_EXP_RUN_DIR", str(made[0]))
    with pytest.raises(RefusedError, match=r"DINO_EXP_RUN_DIR gives each of them this directory; unset it"):
        plan_jobs([["x"], ["y"]], lambda _: target_in(made[0], here))


def test_a_sweep_that_began_meanwhile_keeps_its_jobs(tmp_path: Path) -> None:
    def refuse(overrides: object) -> Target:
        raise ConfigError(f"not {overrides}")

    first, second = teller(refuse), teller(refuse)
    first.starts(announced(tmp_path, ["seed=0"]))
    second.starts(announced(tmp_path, ["seed=1"]))
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
    older = json.loads(path.read_text())
    del older["launch"], older["jobs"][0]["directory"], older["jobs"][1]["directory"]
    path.write_text(json.dumps(older))
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
    target: Any = SimpleNamespace(
        paths=paths, record=record, config=config, key=SimpleNamespace(code_id=CODE_HEX), parent=None
    )
    (planned,) = plan_jobs([["seed=0"]], lambda _: target)
    assert planned.action == action
    assert planned.run_key == paths.directory.name
    assert planned.num_steps_left() == (0 if action == "skip" else 5 - step)


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


def ran(
    outputs: Path, variant: str, group: str, *, secs: int, epochs: int, batch: int = 64, data: str = "digits"
) -> None:
    """A run of vit_nano that has trained its epochs, of 10 steps each, in so many seconds."""
    ended = sample_attempt(outcome="completed", ended_at=f"2026-01-01T00:00:{secs:02d}Z")
    run = make(
        outputs, variant, state="completed", step=10 * epochs, attempts=(ended,),
        schedule=Schedule(horizon_steps=10 * epochs, steps_per_epoch=10), group_hash="g1:" + group * 64,
    )  # fmt: skip
    settings = {"data": {"name": data}, "train": {"batch_size": batch, "epochs": epochs}}
    (run / "config.canonical.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"group": "a", "epochs": 5}, 50.0),  # as long as that of another seed, however many short ones there are
        ({"group": "c", "epochs": 5}, 50 * 0.3),  # by the pace of all of this model and data, and by its own epochs
        ({"group": "c", "epochs": 5, "batch_size": 128}, 50 * 0.3),  # half the steps, of twice the images
        ({"group": "c", "epochs": 5, "stop_after_epochs": 2}, 20 * 0.3),
        ({"group": "c", "epochs": 5, "stop_after_steps": 7}, 7 * 0.3),
        ({"group": "c", "epochs": 5, "parent": {"step": 40}}, 10 * 0.3),  # a fork does what is left
        ({"group": "c", "epochs": 5, "data": "synthetic"}, None),
        ({"group": "c", "epochs": 5, "model": "vit_s"}, None),
    ],
)
def test_the_time_of_a_job_goes_by_its_own_epochs(
    job: dict[str, Any], expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(tmp_path, "long", "a", secs=50, epochs=5)
    for variant in ("s", "t", "u"):
        ran(tmp_path, variant, "b", secs=3, epochs=1)
    ran(tmp_path, "other", "d", secs=59, epochs=1, data="cifar10")
    monkeypatch.setattr("dino_exp.sweeps.teller.group_hash", lambda config: "g1:" + job["group"] * 64)
    target = target_in(tmp_path / "runs" / "new", tmp_path)
    train = {"batch_size": 64, "stop_after_steps": None, "stop_after_epochs": None}
    vars(target.config.train).update(train | {name: job[name] for name in job.keys() & {"epochs", *train}})
    target.config.data.name, target.config.model.name = job.get("data", "digits"), job.get("model", "vit_nano")
    target.parent = job.get("parent")
    (planned,) = plan_jobs([["seed=0"]], lambda _: target)
    assert planned.action == "new"
    assert Paces(tmp_path).secs_left(planned) == (None if expected is None else pytest.approx(expected))


def test_only_what_differs_is_shown() -> None:
    assert differing([["a=1", "seed=0"], ["a=1", "seed=1"]]) == ["seed=0", "seed=1"]
    assert differing([["a=1", "seed=0"]]) == ["a=1 seed=0"]
    assert differing([]) == []
