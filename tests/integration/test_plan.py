"""`plan=true`: what a training would take is printed, and nothing is written."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.pictures import small_tree
from support.runs import RECIPE, Lab

from dino_exp.attempts.plan_text import flop_text, secs_text


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fact(printed: str, name: str) -> str:
    (line,) = (line for line in printed.splitlines() if line.startswith(f"  {name}  "))
    return line.removeprefix(f"  {name}").strip()


def test_a_plan_says_what_a_new_run_would_take_and_writes_nothing(lab: Lab) -> None:
    lab.settings = RECIPE
    printed = lab.train("plan=true", "train.stop_after_steps=30")
    assert not lab.outputs.exists()
    assert "Nothing was written" in printed
    assert fact(printed, "begins") == "a new run"
    assert fact(printed, "steps") == "44 in 2 epochs of 22, stopping at 30"
    assert fact(printed, "to do") == "30 steps"
    assert fact(printed, "training").startswith("26.41 MFLOP an image")
    assert "images a second" in fact(printed, "speed")
    assert fact(printed, "to the stop").startswith("about ")
    assert fact(printed, "to the horizon").startswith("about ")
    assert "warning" not in printed
    lab.train("train.stop_after_steps=30")
    assert lab.only_run().name in printed  # what was planned is what is trained
    assert "plan" not in (lab.only_run() / "config.yaml").read_text()


def test_a_plan_for_images_in_files_makes_no_cache(lab: Lab) -> None:
    small_tree(lab.directory / "images", 60)
    printed = lab.train(
        "experiment=own_images", "data.root=images", "data.cache=true", "plan=true", "data.image_size=32",
        "data.local_size=16", "model=vit_nano", "train.batch_size=8",
    )  # fmt: skip
    assert not lab.outputs.exists()
    assert "images a second" in fact(printed, "speed")
    assert fact(printed, "the cache").startswith("is made first, about ")


@pytest.mark.slow
def test_the_rest_of_a_run_and_of_a_fork_is_planned(lab: Lab) -> None:
    lab.train("train.stop_after_steps=30")
    before = everything(lab.directory)
    lab.settings = ("runtime.threads=1",)
    resumed = lab.train("resume=last", "plan=true")
    assert fact(resumed, "begins") == "goes on from step 30"
    assert fact(resumed, "to do") == "14 steps"
    forked = lab.train("fork=last@30", "plan=true", "train.epochs=5")
    assert fact(forked, "to do") == "80 steps"
    assert lab.only_run().name not in forked.splitlines()[0]
    assert everything(lab.directory) == before


def test_of_a_finished_run_there_is_nothing_to_plan(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    before = everything(lab.directory)
    assert "Nothing to do" in lab.train("train.stop_after_steps=3", "plan=true")
    assert everything(lab.directory) == before


@pytest.mark.slow
def test_each_job_of_a_sweep_is_planned_without_a_record_of_the_sweep(lab: Lab) -> None:
    printed = lab.train("--multirun", "plan=true", "seed=0,1", "train.stop_after_steps=3")
    assert printed.count("Nothing was written") == 2
    assert "job 1: " in printed
    assert not lab.outputs.exists()
    assert "Nothing was written" not in lab.train("--multirun", "plan=true", "seed=0,1", "sweep.dry_run=true")


def test_several_ranks_are_sent_away(lab: Lab) -> None:
    lab.environment |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert "without torchrun" in lab.train("plan=true", code=2)


def test_what_will_not_fit_is_told_and_refuses_nothing(lab: Lab) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    printed = lab.train(
        "plan=true", "train.epochs=100000", f"checkpoint.save.deadline='{soon}'", "checkpoint.keep.last=null",
        "checkpoint.save.every_steps=1", "loss.out_dim=512", "evaluation.every_epochs=null",
    )  # fmt: skip
    assert "warning: time: about " in printed
    assert "warning: disk: checkpoints may take " in printed
    assert "warning: memory" not in printed


def test_a_step_that_does_not_fit_is_not_tried(lab: Lab) -> None:
    printed = lab.train("plan=true", "loss.out_dim=2000000000")
    assert "warning: memory: about " in printed
    assert "not measured: a step needs more than cpu has" in printed
    assert "images a second" not in printed


def test_with_loading_processes_and_parts(lab: Lab) -> None:
    printed = lab.train("plan=true", "runtime.workers=1", "train.accumulate=2", "loss.use_bn=false")
    assert fact(printed, "device").endswith("1 process loads the data")
    assert fact(printed, "data").endswith("64 a step, 32 at once")


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (0, "0 FLOP"),
        (113_828_233_216, "113.8 GFLOP"),
        (999_000, "999 kFLOP"),
        (4.5e18, "4.5 EFLOP"),
        (7e21, "7,000 EFLOP"),
    ],
)
def test_operations_in_words(flops: float, text: str) -> None:
    assert flop_text(flops) == text


@pytest.mark.parametrize(("secs", "text"), [(0.0241, "24.1 ms"), (3.21, "3.21 s"), (130.0, "2m 10s")])
def test_seconds_in_words(secs: float, text: str) -> None:
    assert secs_text(secs) == text
