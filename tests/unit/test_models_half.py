"""Layers in bfloat16 on a CPU: the numbers of torch's own operators, and gradients that the optimizer can use."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dino_exp.models import half
from dino_exp.models.blocks import Block
from dino_exp.models.head import WeightNormLinear
from dino_exp.models.packing import Packing

GROUPS = Packing(((3, 17), (5, 5)))
ONE_ROUNDING = 2.0**-7  # of a bfloat16, relative


@pytest.fixture
def block() -> Block:
    made = Block(32, 4, 64)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if not half.is_for(torch.empty(1)):
            pytest.skip("oneDNN has no products of bfloat16 for this processor")
    return made


def results(block: Block, tokens_TD: torch.Tensor, *, only_class: bool = False) -> list[torch.Tensor]:
    """What the layer gives, and the gradients of its input and its parameters."""
    block.zero_grad()
    given = tokens_TD.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(given, GROUPS, only_class=only_class)
    found.backward(torch.sin(torch.arange(found.numel())).view_as(found))
    return [found.detach(), given.grad, *(parameter.grad for parameter in block.parameters())]


def random_tokens() -> torch.Tensor:
    return torch.randn(GROUPS.num_tokens, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("only_class", [False, True])
def test_a_layer_is_what_the_operators_of_torch_make_of_it(
    block: Block, monkeypatch: pytest.MonkeyPatch, only_class: bool
) -> None:
    found = results(block, random_tokens(), only_class=only_class)
    monkeypatch.setattr(half, "is_for", lambda _: False)
    expected = results(block, random_tokens(), only_class=only_class)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        size = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=ONE_ROUNDING, atol=ONE_ROUNDING * size)


def test_it_is_near_to_what_float32_gives(block: Block) -> None:
    found = results(block, random_tokens())
    exact = block(random_tokens(), GROUPS).detach()
    assert float((found[0] - exact).norm() / exact.norm()) < 0.02


def test_tokens_may_lie_along_several_axes(block: Block) -> None:
    found = []
    for shape in ((6, 32), (2, 3, 32)):
        block.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block.mlp(random_tokens()[:6].view(shape)).sum().backward()
        found.append([parameter.grad for parameter in block.mlp.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_half_parameters_get_half_gradients(block: Block) -> None:
    block.to(torch.bfloat16)
    tokens_TD = random_tokens().to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(tokens_TD, GROUPS).sum().backward()
    assert {parameter.grad.dtype for parameter in block.parameters()} == {torch.bfloat16}


def test_what_can_be_made_again_is_not_kept_for_the_backward_pass(block: Block) -> None:
    last_layer = WeightNormLinear(32, 48, train_norms=False)
    halves = kept_halves(lambda: last_layer(block(random_tokens(), GROUPS)))
    weights = {tuple(weight.shape) for weight in (*block.parameters(), *last_layer.parameters()) if weight.ndim == 2}
    hidden = (GROUPS.num_tokens, 64)
    assert halves.count(hidden) == 1  # before the GELU, not after it
    assert not set(halves) & weights


def kept_halves(forward: Callable[[], torch.Tensor]) -> list[tuple[int, ...]]:
    """The shapes of all bfloat16 tensors that a backward pass reads."""
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        forward().sum().backward()
    return [tuple(tensor.shape) for tensor in kept if tensor.dtype == torch.bfloat16]


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float16, True), (torch.bfloat16, False)])
def test_other_precisions_are_left_to_torch(dtype: torch.dtype, enabled: bool) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
        assert not half.is_for(torch.empty(1))
