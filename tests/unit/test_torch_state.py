"""A plain loop's model and optimizer as one state, for the ways in which AdamW keeps its moments."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.checkpoints import open_manager, request
from torch import nn

from dino_exp.checkpoint.torch_state import OPTIMIZER, TorchState
from dino_exp.errors import CheckpointError


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def default_type(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def make(*, amsgrad: bool) -> TorchState:
    model = nn.Linear(3, 2)
    return TorchState(model, torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=amsgrad), step=0)


def take_steps(state: TorchState, num: int) -> None:
    for _ in range(num):
        state.optimizer.zero_grad()
        state.model(torch.ones(4, 3)).square().sum().backward()
        state.optimizer.step()


@pytest.mark.parametrize("amsgrad", [False, True])
def test_it_comes_back_and_goes_on_to_the_same_bits(tmp_path: Path, amsgrad: bool, default_type: torch.dtype) -> None:
    first, second = make(amsgrad=amsgrad), make(amsgrad=amsgrad)
    take_steps(first, 2)
    open_manager(tmp_path).save(first, request(1))
    open_manager(tmp_path).restore(second, optional=(OPTIMIZER,))
    for state in (first, second):
        take_steps(state, 3)
    for name, value in first.state_dict().items():
        assert value == second.state_dict()[name] if name == "step" else torch.equal(value, second.state_dict()[name])
    assert first.model.weight.dtype == default_type


@pytest.mark.parametrize("amsgrad", [False, True])
def test_moments_of_another_optimizer_are_refused_before_anything_is_touched(tmp_path: Path, amsgrad: bool) -> None:
    saved, other = make(amsgrad=amsgrad), make(amsgrad=not amsgrad)
    take_steps(saved, 2)
    open_manager(tmp_path).save(saved, request(1))
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(CheckpointError, match="moments do not fit"):
        open_manager(tmp_path).restore(other, optional=(OPTIMIZER,))
    assert all(torch.equal(value, before[name]) for name, value in other.model.state_dict().items())
