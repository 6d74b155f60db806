"""A host that asks late how its steps went (`StepRule.read_every`), in whole trainings: nothing is committed that it
has not heard of, and what it hears late is told as if it had heard at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import open_manager
from support.tiny_training import PLAN, RULE, Kick, TinyRun

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf, KeepAny, LatestN, OnSignal
from dino_exp.checkpoint.types import SaveContext
from dino_exp.dist.council import LostRankError
from dino_exp.dist.ranks import ONE_RANK
from dino_exp.training import saving
from dino_exp.training.loop import Training
from dino_exp.training.verdict import NonFiniteError


class AtFirstStep:
    def should_save(self, context: SaveContext) -> tuple[str, ...]:
        return ("first step",) if context.step == 1 else ()


class LateRun(TinyRun):
    """Rows and evaluations are never due, step 1 is saved, and what a signal stops; step 3 has NaN in its crops."""

    def __init__(self, folder: Path, *, read_every: int = 4, stop_step: int = 6, bad_step: int | None = 3) -> None:
        super().__init__(folder)
        self.read_every, self.stop_step, self.bad_step = read_every, stop_step, bad_step
        self.training: Training | None = None

    def build(self, *arguments: Any) -> Training:
        made = super().build(*arguments)
        made.rule = dataclasses.replace(RULE, read_every=self.read_every)
        made.plan = dataclasses.replace(
            PLAN, evaluate_every_epochs=None, log_every_steps=100, stop_step=self.stop_step, horizon_steps=6
        )
        made.evaluator = None
        made.augment = self.poisoned(made.augment, made)
        self.training = made
        return made

    def poisoned(self, augment: Callable[..., list[torch.Tensor]], training: Training) -> Callable[..., Any]:
        def made(*arguments: Any) -> list[torch.Tensor]:
            crops = augment(*arguments)
            return [crop * math.nan for crop in crops] if training.state.step + 1 == self.bad_step else crops

        return made

    def open(self, files: Any) -> CheckpointManager:
        return open_manager(
            self.folder / "checkpoints", save=AnyOf((AtFirstStep(), OnSignal())), keep=KeepAny((LatestN(5),)),
            attempt=self.attempt, files=files, background=self.beside, require_finite=True, on_event=self.events,
        )  # fmt: skip


def digest_of(folder: Path, step: int, read_every: int) -> str:
    """The state after so many steps of a run in which nothing happened."""
    run = LateRun(folder, read_every=read_every, bad_step=None)
    assert run.train(Kick("between optimizer and teacher", step, signal.SIGTERM)).step == step
    return str(run.newest().state_digest)


@contextlib.contextmanager
def unreadable_verdicts(monkeypatch: pytest.MonkeyPatch, run: LateRun, times: int) -> Any:
    """After the save of step 1 the device does not give away the first so many reports that it is asked for."""
    real, left = torch.Tensor.cpu, [times]

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        assert run.training is not None
        if tensor.shape == (3,) and run.training.state.step > 1 and left[0]:
            left[0] -= 1
            raise RuntimeError("CUDA error: the device is lost")
        return real(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", cpu)
        yield


def test_what_could_not_be_read_is_read_again_before_anything_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LateRun(tmp_path / "run")
    with unreadable_verdicts(monkeypatch, run, 1), pytest.raises(RuntimeError, match="device is lost") as caught:
        run.train()
    assert "step 3: the loss (nan) is not finite" in "\n".join(caught.value.__notes__)
    assert run.newest().step == 2
    assert run.newest().state_digest == digest_of(tmp_path / "straight", 2, 4)
    assert run.training is not None
    assert run.training.state.loss_count == 2


def test_what_cannot_be_read_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LateRun(tmp_path / "run", bad_step=None)
    with unreadable_verdicts(monkeypatch, run, 99), pytest.raises(RuntimeError, match="device is lost") as caught:
        run.train()
    notes = "\n".join(caught.value.__notes__)
    assert "whether the steps up to 5 went well cannot be read" in notes
    assert "nothing was saved at step 5; the last checkpoint is that of step 1" in notes
    assert run.newest().step == 1


def test_at_the_end_the_last_good_step_is_saved(tmp_path: Path) -> None:
    run = LateRun(tmp_path / "run", stop_step=4)
    with pytest.raises(NonFiniteError, match="step 3"):
        run.train()
    assert (run.newest().step, run.newest().reasons) == (2, ("emergency",))


def test_it_is_told_beside_another_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LateRun(tmp_path / "run", read_every=9)
    poisoned = run.poisoned

    def failing(augment: Callable[..., list[torch.Tensor]], training: Training) -> Callable[..., Any]:
        def made(*arguments: Any) -> list[torch.Tensor]:
            if training.state.step == 3:
                raise OSError("disk read error")
            return list(poisoned(augment, training)(*arguments))

        return made

    monkeypatch.setattr(run, "poisoned", failing)
    with pytest.raises(OSError, match="disk read error") as caught:
        run.train()
    assert caught.value.__notes__ == ["before that, unnoticed: step 3: the loss (nan) is not finite"]
    assert run.newest().step == 2


@pytest.mark.parametrize("read_every", [1, 9])
def test_an_error_before_the_update_leaves_the_statistics_of_the_step_before(tmp_path: Path, read_every: int) -> None:
    """Those of batch norm, which the forward pass of the step that fails has moved."""
    run = LateRun(tmp_path / "run", read_every=read_every, bad_step=None)
    build = run.build

    def failing(*arguments: Any) -> Training:
        made, calls = build(*arguments), list[int]()
        assert made.manager is not None

        def before_update() -> None:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("an event failed")

        made.manager.before_update = before_update  # type: ignore[method-assign]
        return made

    run.build = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="an event failed"):
        run.train()
    assert run.newest().state_digest == digest_of(tmp_path / "straight", 2, read_every)


@pytest.mark.parametrize(("error", "asks"), [(LostRankError("rank 1 has ended"), False), (ValueError("of ours"), True)])
def test_a_device_that_may_wait_for_a_lost_rank_is_not_asked(
    error: Exception, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would never answer: a collective of NCCL that the lost rank has not joined lies before what is asked for."""
    asked: list[Any] = []
    monkeypatch.setattr(saving, "settle", asked.append)
    state = SimpleNamespace(step=5, unread=[object()])
    training: Any = SimpleNamespace(state=state, parallel=SimpleNamespace(ranks=ONE_RANK), manager=None)
    assert saving.emergency_save(training, error) is error
    assert bool(asked) is asks
