"""`init.weights=`: a training that begins with the weights of a file, and is named by their digest."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.runs import RECIPE, Lab, assert_same_end, events, manifests, record

from dino_exp import build
from dino_exp.attempts.reproduction import Span, choose_span, compare_replay, prepare_copy
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.run_details import describe
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.errors import UsageError
from dino_exp.runs.command import command_of
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record

QUICK = (*RECIPE, "train.epochs=1", "evaluation.every_epochs=null")


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the official program writes: student and teacher with their heads, and its arguments."""
    state = build.build_state(config_from_mapping(compose([*RECIPE, "seed=7"])), 1, torch.device("cpu"))
    with torch.no_grad():
        for parameter in state.teacher.parameters():
            parameter *= 0.9
    path = tmp_path_factory.mktemp("official") / "dino.pth"
    student = {f"module.{name}": tensor for name, tensor in state.student.state_dict().items()}
    made = {"student": student, "teacher": state.teacher.state_dict(), "epoch": 3}
    torch.save({**made, "args": argparse.Namespace(arch="vit_nano", lr=5e-4)}, path)
    return path


@pytest.fixture
def weights(lab: Lab, official: Path) -> Path:
    """That file beside the outputs, and trainings of one epoch without evaluation."""
    lab.settings = QUICK
    return Path(shutil.copyfile(official, lab.directory / "dino.pth"))


def teacher(path: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)["teacher"]


def test_student_and_teacher_begin_with_the_file_and_it_is_recorded(lab: Lab, weights: Path) -> None:
    lab.settings = RECIPE  # with the evaluation before the first step
    printed = lab.train("init.weights=dino.pth", "train.stop_after_steps=2")
    assert f"weights    teacher of {weights}: 48 tensors loaded\n" in printed
    run = lab.only_run()
    first = CheckpointReader(run / "checkpoints").load_tensors(0)
    for name, tensor in teacher(weights).items():
        assert torch.equal(first[f"student.{name}"], tensor)
        assert torch.equal(first[f"teacher.{name}"], tensor)
    digest = "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()
    identity = json.loads((run / "config.canonical.json").read_text())["init"]
    assert identity == {"scheme": "fan_in", "weights_digest": digest}
    expected = {
        "path": str(weights), "digest": digest, "source": "teacher", "loaded": 48, "missing": [], "num_missing": 0,
        "unexpected": [], "num_unexpected": 0, "resized": None, "head_left": None, "text": "48 tensors loaded",
    }  # fmt: skip
    assert record(run)["weights"] == expected
    (event,) = events(run, "weights_loaded")
    assert {name: value for name, value in event.items() if name not in ("time", "kind")} == expected
    assert manifests(run)[0]["reasons"] == ["initial weights"]
    found = load_record(RunPaths(run).run_json)
    assert found is not None
    assert describe(RunPaths(run), found)["weights"] == expected
    assert "init.weights=dino.pth" in command_of(RunPaths(run))


@pytest.mark.slow
def test_the_file_is_not_needed_after_the_start(lab: Lab, weights: Path) -> None:
    whole = Lab(lab.directory / "whole", QUICK)
    whole.directory.mkdir()
    whole.train(f"init.weights={weights}")
    lab.train("init.weights=dino.pth", "train.stop_after_steps=7")
    run = lab.only_run()
    weights.unlink()
    lab.train("init.weights=dino.pth", "train.stop_after_steps=12")  # the same command, as a requeued job types it
    lab.settings = ()
    lab.train(f"resume={run}")
    assert record(run)["state"] == "completed"
    assert len(events(run, "weights_loaded")) == 1
    assert_same_end(run, whole.only_run())


def test_the_path_does_not_name_the_run_and_other_weights_are_refused(lab: Lab, weights: Path) -> None:
    lab.train("init.weights=dino.pth", "train.stop_after_steps=1")
    run = lab.only_run()
    shutil.copyfile(weights, lab.directory / "copy.pth")
    assert "Attempt 2" in lab.train("init.weights=copy.pth", "train.stop_after_steps=2")
    assert lab.runs() == [run]
    torch.save({"teacher": teacher(weights)}, lab.directory / "copy.pth")
    lab.settings = ()
    table = lab.train(f"resume={run}", "init.weights=copy.pth", code=3)
    assert [line.split()[-1] for line in table.splitlines() if "init.weights_digest" in line] == ["refused"]


def test_weights_of_another_model_leave_no_run(lab: Lab, weights: Path) -> None:
    printed = lab.train("init.weights=dino.pth", "model=vit_t", code=2)
    assert "these weights are of another model: " in printed
    assert "What fits: model=vit_nano\n" in printed
    assert "Traceback" not in printed
    assert not [run for run in lab.runs() if (run / "run.json").exists()]


def test_a_fork_begins_with_its_parent_and_needs_no_file(lab: Lab, weights: Path) -> None:
    lab.train("init.weights=dino.pth", "train.stop_after_steps=3")
    parent = lab.only_run()
    weights.unlink()
    lab.settings = ()
    lab.train(f"fork={parent}", "optimizer.lr=1e-3", "train.stop_after_steps=4")
    (child,) = [run for run in lab.runs() if run != parent]
    assert manifests(child)[3]["state_digest"] == manifests(parent)[3]["state_digest"]
    assert "weights" not in record(child)


def test_a_run_that_saves_nothing_needs_the_same_file_again(lab: Lab, weights: Path) -> None:
    lab.train("init.weights=dino.pth", "checkpoint=none", "train.stop_after_steps=1")
    run = lab.only_run()
    again = (f"resume={run}", "train.stop_after_steps=2")
    lab.settings = ()
    torch.save({"teacher": teacher(weights)}, weights)
    assert "is not the file that this run is named by" in lab.train(*again, code=3)
    weights.unlink()
    assert "so it needs the file" in lab.train(*again, code=2)
    assert record(run)["step"] == 1


def test_it_can_be_reproduced_from_its_first_checkpoint(lab: Lab, weights: Path) -> None:
    lab.train("init.weights=dino.pth", "train.stop_after_steps=3")
    weights.unlink()
    paths = RunPaths(lab.only_run())
    made = load_record(paths.run_json)
    assert made is not None
    span = choose_span(paths, made, at=None, num_steps=None)
    assert span == Span(start=0, stop=3)
    copy = prepare_copy(paths, made, span, lab.directory / "again")
    lab.settings = ()
    lab.train(f"resume={copy.directory}", "train.stop_after_steps=3")
    found = compare_replay(paths, copy, span)
    assert (found.num_rows, found.states, found.difference) == (3, (3,), None)
    (paths.checkpoints / "step-000000000.json").unlink()
    with pytest.raises(UsageError, match=r"--at 0: no checkpoint of this step; there are: 3$"):
        choose_span(paths, made, at=0, num_steps=None)
