import copy

import pytest
import torch
from torch.nn import functional

from dino_exp.errors import ConfigError
from dino_exp.models.blocks import Attention
from dino_exp.models.init import materialise
from dino_exp.models.packing import Packing
from dino_exp.models.vit import PatchEmbed, VisionTransformer, resize_matrix


def shape_only(**settings):
    with torch.device("meta"):
        return VisionTransformer(in_channels=3, image_size=224, **settings)


def tiny(dtype=torch.float32, **changes):
    settings = {
        "image_size": 16,
        "patch_size": 4,
        "in_channels": 1,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 4,
    }
    return materialise(lambda: VisionTransformer(**(settings | changes)), seed=0, scheme="fan_in").to(dtype)


def random_images(*shape, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "patch_size", "expected"),
    [
        (192, 3, 16, 5_524_416),
        (384, 6, 16, 21_665_664),
        (384, 6, 8, 21_670_272),
        (768, 12, 16, 85_798_656),
        (768, 12, 8, 85_807_872),
    ],
)
def test_parameter_counts_of_the_official_models(embed_dim, num_heads, patch_size, expected):
    model = shape_only(embed_dim=embed_dim, depth=12, num_heads=num_heads, patch_size=patch_size)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert len(list(model.parameters())) == len(model.state_dict()) == 150


def test_parameters_have_the_official_names_in_the_official_order():
    layer = [
        f"{part}.{kind}"
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    expected = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    expected += [f"blocks.{number}.{name}" for number in range(2) for name in layer]
    expected += ["norm.weight", "norm.bias"]
    model = shape_only(embed_dim=192, depth=2, num_heads=3, patch_size=16)
    assert [name for name, _ in model.named_parameters()] == expected
    assert set(model.state_dict()) == set(expected)


@pytest.mark.parametrize(("base", "rows", "cols"), [(14, 6, 6), (4, 2, 2), (4, 3, 7), (14, 14, 14), (3, 20, 5)])
def test_position_resize_equals_the_official_interpolation(base, rows, cols):
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(base * base, 8, generator=generator, dtype=torch.float64) * 2 - 1
    official = functional.interpolate(
        table.reshape(1, base, base, 8).permute(0, 3, 1, 2),
        scale_factor=((rows + 0.1) / base, (cols + 0.1) / base),
        mode="bicubic",
    )
    assert official.shape[-2:] == (rows, cols)
    expected = official.permute(0, 2, 3, 1).reshape(rows * cols, 8)
    torch.testing.assert_close(resize_matrix(base, rows, cols) @ table, expected, rtol=0, atol=1e-15)


def test_position_resize_is_not_the_one_by_size():
    table = torch.sin(torch.arange(196, dtype=torch.float64)).reshape(1, 1, 14, 14)
    by_size = functional.interpolate(table, size=(6, 6), mode="bicubic").flatten()
    assert (resize_matrix(14, 6, 6) @ table.flatten() - by_size).abs().max() > 0.01


def test_positions_of_the_base_image_are_the_table_itself():
    model = tiny()
    assert model._positions(16, 16) is model.pos_embed
    assert model._positions(18, 18) is model.pos_embed  # the same grid, as in the official code


def test_rows_and_columns_of_an_oblong_image_are_told_apart():
    model, image = tiny(torch.float64), random_images(1, 1, 8, 24, dtype=torch.float64)
    positions = model._positions(8, 24)[:, 1:]
    expected = resize_matrix(4, 2, 6) @ model.pos_embed[:, 1:]
    assert torch.equal(positions, expected)
    assert model(image).shape == (1, 16)
    assert not torch.allclose(model(image), model(image.transpose(2, 3)))


def test_a_teacher_in_inference_mode_may_resize_first():
    model, local = tiny(), random_images(2, 1, 8, 8)
    with torch.inference_mode():
        model(local)
    model(local).sum().backward()
    assert model.pos_embed.grad.abs().sum() > 0


def test_positions_keep_full_precision_under_autocast():
    model = tiny()
    plain = model._positions(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model._positions(8, 8), plain)


def test_patches_equal_the_convolution():
    embed, images = PatchEmbed(3, 8, 4).double(), random_images(2, 3, 14, 9, dtype=torch.float64)
    expected = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected, rtol=1e-12, atol=1e-12)


def test_attention_equals_the_written_out_form():
    attention, tokens = Attention(16, 4).double(), random_images(2, 7, 16, dtype=torch.float64)
    query, key, value = attention.qkv(tokens).reshape(2, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    scores = (query @ key.transpose(-2, -1)) * 4**-0.5
    expected = attention.proj((scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 7, 16))
    rows, packing = tokens.flatten(0, 1), Packing(((2, 7),))
    torch.testing.assert_close(attention(rows, packing), expected.flatten(0, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(rows, packing, only_class=True), expected[:, 0], rtol=1e-12, atol=1e-12)


def test_class_token_alone_equals_the_class_token_among_all():
    model, images = tiny(torch.float64), random_images(3, 1, 16, 16, dtype=torch.float64)
    tokens = model.forward_tokens(images)
    assert tokens.shape == (3, 17, 16)
    torch.testing.assert_close(model(images), tokens[:, 0], rtol=1e-12, atol=1e-13)


def test_class_token_alone_has_the_gradient_of_the_class_token_among_all():
    model, images = tiny(torch.float64), random_images(3, 1, 8, 8, dtype=torch.float64)
    weights = torch.arange(16, dtype=torch.float64)
    alone = torch.autograd.grad((model(images) * weights).sum(), list(model.parameters()))
    among = torch.autograd.grad((model.forward_tokens(images)[:, 0] * weights).sum(), list(model.parameters()))
    for one, other in zip(alone, among, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_copy_is_equal_and_independent():
    model, images = tiny(), random_images(2, 1, 8, 8)
    before = model(images)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.pos_embed.zero_()
    assert torch.equal(other(images), before)
    assert not torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"num_heads": 3}, "num_heads"), ({"image_size": 18}, "image_size"), ({"image_size": 2}, "image_size")],
)
def test_impossible_shapes_are_refused(change, key):
    with pytest.raises(ConfigError, match=key):
        tiny(**change)
