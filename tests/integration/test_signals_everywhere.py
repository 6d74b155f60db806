"""A signal at each place of the loop, once and twice: one save at a safe place, and the run ends in the same bits.

Whole trainings in this process, so that a signal can be placed exactly: at the n-th call of what stands at that place.
"""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.runs import SMOKE, assert_same_end, events, manifests, record

from dino_exp import build
from dino_exp.attempts.attempt import Command
from dino_exp.attempts.run import run_attempt
from dino_exp.attempts.target import start_target
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.saving import Saver
from dino_exp.checkpoint.store import Store
from dino_exp.config.compose import compose
from dino_exp.data.augment_digits import DigitsAugment
from dino_exp.data.loader import BatchStream
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.runs.rows import RowWriter
from dino_exp.runs.signals import SignalFlags
from dino_exp.training import loop, step

SMALL = (*SMOKE, "train.batch_size=256", "evaluation.every_epochs=null", "checkpoint.save.every_steps=2")
HORIZON = 10

# Where a signal comes: whose method or function, and at which of its calls.
PLACES: dict[str, tuple[Any, str, int]] = {
    "before the loop is built": (build, "build_state", 1),
    "before the first step": (loop, "begin", 1),
    "waiting for data": (BatchStream, "__next__", 4),
    "augmentation": (DigitsAugment, "__call__", 4),
    "forward of the teacher": (MultiCropModel, "forward", 7),
    "forward of the student": (MultiCropModel, "forward", 8),
    "backward": (torch.Tensor, "backward", 4),
    "before the update": (CheckpointManager, "before_update", 4),
    "between gradients and optimizer": (step, "set_hyper", 4),
    "between optimizer and teacher": (step, "ema_update_", 4),
    "while a row is written": (RowWriter, "append", 4),
    "while a save begins": (CheckpointManager, "save", 2),
    "in the thread that saves": (Saver, "save", 2),
    "at the commit": (Store, "commit", 2),
    "in retention": (Ledger, "retain", 3),
    "in the last step": (step, "ema_update_", HORIZON),
    "at the very end": (loop, "end_saving", 1),
}


def train_here(outputs: Path, *overrides: str) -> int:
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
    assert train_here(outputs) == 0
    return only(outputs)


def plant(monkeypatch: pytest.MonkeyPatch, place: str, signals: tuple[int, ...]) -> None:
    """Send `signals` to this process at `place`, once."""
    owner, name, call = PLACES[place]
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def signalled(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalled)


def check_stop(run: Path, reference: Path, number: int, code: int) -> None:
    """One clean save, unless the training was over already; and the run goes on to the same end."""
    found = record(run)
    if code == 0:
        assert found["state"] == "completed"
    else:
        assert code == 128 + number
        assert found["state"] in ("preempted", "completed")
        saved = [event for event in events(run, "saved") if f"signal {signal.Signals(number).name}" in event["reasons"]]
        assert len(saved) <= 1
        if found["step"]:
            assert max(manifests(run)) == found["step"]
    assert train_here(run.parents[1]) == 0
    assert_same_end(run, reference)
    assert record(run)["state"] == "completed"


@pytest.mark.parametrize("place", list(PLACES)[::3])  # the others: in the crash suite
def test_a_stop_signal_at_each_place(
    place: str, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, place, (signal.SIGTERM,))
    code = train_here(tmp_path)
    monkeypatch.undo()
    check_stop(only(tmp_path), reference, signal.SIGTERM, code)


@pytest.mark.crash
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("num_signals", [1, 2])
@pytest.mark.parametrize(("workers", "background"), [(0, "true"), (0, "false"), (2, "true")])
@pytest.mark.parametrize("place", PLACES)
def test_one_and_two_signals_at_each_place(
    place: str, workers: int, background: str, num_signals: int, number: int,
    tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(monkeypatch, place, (number,) * num_signals)
    try:
        code = train_here(tmp_path, f"runtime.workers={workers}", f"checkpoint.storage.background={background}")
    except KeyboardInterrupt:
        assert (number, num_signals) == (signal.SIGINT, 2)
        monkeypatch.undo()
        assert train_here(tmp_path) == 0
        assert_same_end(only(tmp_path), reference)
        return
    monkeypatch.undo()
    check_stop(only(tmp_path), reference, number, code)


@pytest.mark.parametrize("place", ["backward", "while a save begins"])
def test_a_second_interrupt_leaves_at_once_and_loses_no_commit(
    place: str, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, place, (signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_here(tmp_path)
    monkeypatch.undo()
    run = only(tmp_path)
    assert record(run)["state"] == "interrupted"
    assert train_here(tmp_path) == 0
    assert_same_end(run, reference)


@pytest.mark.parametrize("place", ["backward", "in the thread that saves"])
def test_usr1_saves_and_training_goes_on(
    place: str, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, place, (signal.SIGUSR1, signal.SIGUSR1))
    assert train_here(tmp_path) == 0
    run = only(tmp_path)
    assert_same_end(run, reference)
    assert any("signal SIGUSR1" in event["reasons"] for event in events(run, "saved"))


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalFlags() as flags:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert flags.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
