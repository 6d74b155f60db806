"""A stop signal that comes before an evaluation that is due: the row waits in the state."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from support.runs import SMOKE, assert_same_end, manifests, record, rows

from dino_exp.attempts.attempt import Command
from dino_exp.attempts.run import run_attempt
from dino_exp.attempts.target import start_target
from dino_exp.config.compose import compose
from dino_exp.train import find_target
from dino_exp.training.evaluator import Evaluator

SMALL = (*SMOKE, "train.batch_size=128")
EPOCH = 11


def run_here(outputs: Path, *overrides: str) -> int:
    typed = [*SMALL, f"paths.outputs={outputs}", *overrides]
    composed = compose(typed)
    return run_attempt(
        lambda: start_target(composed), Command(overrides=typed, composed=composed), Console(file=io.StringIO())
    )


def only(outputs: Path) -> Path:
    (run,) = (outputs / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("reference")
    assert run_here(outputs) == 0
    return only(outputs)


def test_a_fork_of_a_state_whose_evaluation_is_pending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Evaluator.measure

    def interrupted(self, state, should_stop):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, state, should_stop)

    monkeypatch.setattr(Evaluator, "measure", interrupted)
    assert run_here(tmp_path) == 128 + signal.SIGTERM
    monkeypatch.undo()
    parent = only(tmp_path)
    typed = [f"fork={parent}", f"paths.outputs={tmp_path}", "optimizer.lr=1e-3", "train.stop_after_steps=12"]
    composed = compose(typed)
    command = Command(overrides=typed, composed=composed)
    assert run_attempt(lambda: find_target(composed, typed), command, Console(file=io.StringIO())) == 0
    child = next(run for run in (tmp_path / "runs").iterdir() if run != parent)
    assert [row["step"] for row in rows(child)] == [EPOCH, EPOCH + 1]
    assert "knn_top1" in manifests(child)[EPOCH]["metrics"]


@pytest.mark.parametrize(("method", "step"), [("baselines", 0), ("measure", EPOCH), ("measure", 2 * EPOCH)])
def test_a_signal_during_an_evaluation(
    method: str, step: int, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Evaluator, method)

    def interrupted(self, state, should_stop):  # type: ignore[no-untyped-def]
        if state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, state, should_stop)

    monkeypatch.setattr(Evaluator, method, interrupted)
    assert run_here(tmp_path) == 128 + signal.SIGTERM
    run = only(tmp_path)
    saved = manifests(run)[step]
    assert record(run)["state"] == "preempted"
    assert saved["state"]["pending_row"]["step"] == step
    assert [row["step"] for row in rows(run)] == list(range(step))
    monkeypatch.undo()

    assert run_here(tmp_path) == 0
    assert_same_end(run, reference)
    assert record(run)["state"] == "completed"
    if step:
        settled = manifests(run)[step]
        assert settled["state"]["pending_row"] is None
        assert settled["metrics"]["knn_top1"] == manifests(reference)[step]["metrics"]["knn_top1"]
        assert settled["state_digest"] == manifests(reference)[step]["state_digest"]
    packs = {pack["name"] for manifest in manifests(run).values() for pack in manifest["packs"]}
    assert {path.name for path in (run / "checkpoints" / "packs").iterdir()} == packs
