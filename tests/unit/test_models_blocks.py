"""The layers on tokens of several sizes in one row."""

import pytest
import torch
from torch.nn import functional

from dino_exp.models.blocks import Block, attend, class_tokens
from dino_exp.models.packing import Packing, packed


def random_tokens(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def random_block() -> Block:
    torch.manual_seed(0)
    return Block(16, 4, 32).double()


def test_a_row_of_tokens_falls_into_its_groups_again() -> None:
    groups = [random_tokens(2, 5, 3), random_tokens(4, 2, 3)]
    row, packing = packed(groups)
    assert packing == Packing(((2, 5), (4, 2)))
    assert row.shape == (packing.num_tokens, 3) == (18, 3)
    assert all(torch.equal(one, other) for one, other in zip(packing.split(row), groups, strict=True))
    assert class_tokens(row, packing).tolist() == [*groups[0][:, 0].tolist(), *groups[1][:, 0].tolist()]
    each = packing.per_token(torch.arange(6.0))
    assert each[:, 0].tolist() == [0.0] * 5 + [1.0] * 5 + [2.0] * 2 + [3.0] * 2 + [4.0] * 2 + [5.0] * 2


def test_sizes_together_give_what_each_gives_alone() -> None:
    block, groups = random_block(), [random_tokens(2, 5, 16), random_tokens(3, 2, 16)]
    scales = torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    row, packing = packed(groups)
    together = block(row, packing, packing.per_token(scales))
    alone = []
    for group, images in zip(groups, (slice(0, 2), slice(2, 5)), strict=True):
        own, own_packing = packed([group])
        alone.append(block(own, own_packing, own_packing.per_token(scales[:, images])))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_class_tokens_alone_are_those_of_all_tokens() -> None:
    block, (row, packing) = random_block(), packed([random_tokens(2, 5, 16), random_tokens(3, 2, 16)])
    scales = packing.per_token(torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.0], [0.0, 1.0, 1.0, 2.0, 0.0]]).double())
    for given in (None, scales):
        whole = class_tokens(block(row, packing, given), packing)
        torch.testing.assert_close(block(row, packing, given, only_class=True), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_half_precision_is_that_of_whole_numbers(dtype: torch.dtype, autocast: bool) -> None:
    exact = [random_tokens(3, 4, 7, 8).requires_grad_() for _ in range(3)]
    half = [one.detach().to(dtype).requires_grad_() for one in exact]
    expected = functional.scaled_dot_product_attention(*exact)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = attend(*half)
        with torch.no_grad():
            fused = attend(*half)
    assert found.dtype == fused.dtype == dtype
    rough = {"rtol": 0.05, "atol": 0.03}
    torch.testing.assert_close(found.double(), expected, **rough)
    torch.testing.assert_close(fused.double(), expected, **rough)
    expected.sum().backward()
    found.sum().backward()
    for ours, theirs in zip(half, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0.1, atol=0.05)
