"""The attention of the last block: the weights that its output is really made with, and the model left as it was."""

import pytest
import torch
from test_models_vit import random_images, tiny
from torch.nn import functional

from dino_exp.evaluation.attention import class_attention
from dino_exp.models.packing import packed


@pytest.mark.parametrize("side", [16, 24])
def test_the_weights_with_the_values_are_the_output_of_the_last_block(side):
    model, images = tiny(torch.float64), random_images(3, 1, side, side, dtype=torch.float64)
    inputs = []
    hook = model.blocks[-1].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    expected = model.forward_tokens(images)
    hook.remove()
    weights = model.last_attention(images)
    num_tokens = (side // 4) ** 2 + 1
    assert weights.shape == (3, 4, num_tokens, num_tokens)
    assert torch.allclose(weights.sum(dim=-1), torch.ones((), dtype=torch.float64))
    block, (rows,) = model.blocks[-1], inputs
    tokens = rows.view(3, num_tokens, -1)
    _, _, value = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    kept = tokens + block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
    assert torch.allclose(model.norm(kept + block.mlp(block.norm2(kept))), expected, atol=1e-12)


def test_the_weights_are_softmax_of_queries_times_keys():
    model, images = tiny(torch.float64), random_images(2, 1, 16, 16, dtype=torch.float64)
    rows, packing = packed([model._embed(images)])
    (tokens,) = packing.split(model.blocks[0](rows, packing))
    block = model.blocks[1]
    qkv = functional.linear(block.norm1(tokens), block.attn.qkv.weight, block.attn.qkv.bias)
    query, key = qkv[..., 4:8], qkv[..., 16 + 4 : 16 + 8]  # of the second head, of width 4
    scores = torch.einsum("bqd,bkd->bqk", query, key) / 2
    expected = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    assert torch.allclose(model.last_attention(images)[:, 1], expected, atol=1e-12)


def test_class_attention_is_the_first_row_by_patches():
    model, images = tiny(), random_images(2, 1, 16, 24)
    model.train()
    maps = class_attention(model, images)
    assert maps.shape == (2, 4, 4, 6)
    assert not maps.requires_grad
    assert model.training
    whole = model.last_attention(images)[:, :, 0]
    assert torch.allclose(maps[:, :, 1, 2], whole[:, :, 1 + 6 + 2])
    assert torch.allclose(maps.sum(dim=(2, 3)), 1 - whole[:, :, 0], atol=1e-6)


def test_last_tokens_are_those_after_each_block_and_the_norm():
    model, images = tiny(depth=3), random_images(2, 1, 16, 16)
    first, second = model.last_tokens(images, 2)
    assert torch.equal(second, model.forward_tokens(images))
    rows, packing = packed([model._embed(images)])
    rows = model.blocks[1](model.blocks[0](rows, packing), packing)
    assert torch.equal(first.flatten(0, 1), model.norm(rows))
    assert len(model.last_tokens(images, 3)) == 3
    for num in (0, 4):
        with pytest.raises(ValueError, match="expected 1 to 3"):
            model.last_tokens(images, num)
