import copy

import pytest
import torch

from dino_exp.checkpoint.torch_state import load_moments, optimizer_moments
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.dino.optim import (
    build_optimizer,
    clip_per_parameter_,
    ema_update_,
    freeze_last_layer_,
    parameter_groups,
    set_hyper,
)
from dino_exp.errors import CheckpointError, ConfigError
from dino_exp.models.head import DINOHead
from dino_exp.models.init import materialise
from dino_exp.models.vit import VisionTransformer


def make(*, norm_last_layer=True, embed_dim=16, depth=2, num_heads=2):
    backbone = VisionTransformer(
        image_size=8, patch_size=4, in_channels=1, embed_dim=embed_dim, depth=depth, num_heads=num_heads
    )
    head = DINOHead(
        in_dim=embed_dim,
        out_dim=12,
        hidden_dim=24,
        bottleneck_dim=8,
        use_bn=False,
        norm_last_layer=norm_last_layer,
    )
    return MultiCropModel(backbone, head)


def named(model):
    return dict(model.named_parameters())


def train(model, optimizer, steps, *, frozen_until=0):
    for step in steps:
        images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        logits, _ = model([images])
        optimizer.zero_grad()
        logits.square().sum().backward()
        if step < frozen_until:
            freeze_last_layer_(named(model))
        set_hyper(optimizer, lr=0.01, weight_decay=0.1)
        optimizer.step()


def test_group_sizes_of_vit_tiny_with_its_head():
    for norm_last_layer, num_decayed in ((True, 55), (False, 56)):
        with torch.device("meta"):
            model = make(norm_last_layer=norm_last_layer, embed_dim=192, depth=12, num_heads=3)
        decayed, exempt = parameter_groups(model)
        assert (len(decayed), len(exempt)) == (num_decayed, 102)


def test_class_token_positions_and_lengths_decay_and_biases_and_norms_do_not():
    model = make(norm_last_layer=False)
    decayed, exempt = ({id(parameter) for parameter in group} for group in parameter_groups(model))
    by_name = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name in ("backbone.cls_token", "backbone.pos_embed", "head.last_layer.weight_g", "head.mlp.0.weight"):
        assert by_name[name] in decayed, name
    for name in ("backbone.norm.weight", "backbone.blocks.0.attn.qkv.bias", "backbone.patch_embed.proj.bias"):
        assert by_name[name] in exempt, name
    assert len(decayed) + len(exempt) == len(by_name)


@pytest.mark.parametrize(("name", "decayed"), [("adamw", 0.95), ("sgd", 0.95), ("lars", 0.9999)])
def test_weight_decay_reaches_the_first_group_only(name, decayed):
    model = materialise(make, seed=0, scheme="official")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = build_optimizer(name, model)
    set_hyper(optimizer, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for parameter in parameter_groups(model)[0]:
        torch.testing.assert_close(parameter, torch.full_like(parameter, decayed), rtol=0, atol=1e-7)
    for parameter in parameter_groups(model)[1]:
        assert torch.equal(parameter, torch.ones_like(parameter))


def test_fused_adamw_equals_the_plain_one():
    models = [materialise(make, seed=0, scheme="fan_in").double() for _ in range(2)]
    for model, fused in zip(models, (True, False), strict=True):
        optimizer = build_optimizer("adamw", model, fused=fused)
        for step in range(3):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = torch.sin(parameter.detach() * (step + 1) + number) if number else None
            set_hyper(optimizer, lr=0.01, weight_decay=0.1)
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_unknown_optimizer_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.name.*adam"):
        build_optimizer("adam", make())


def gradients(dtype=torch.float32):
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (5, 3, 700, 2)]
    generator = torch.Generator().manual_seed(0)
    for parameter, scale in zip(parameters, (0.001, 10.0, 1.0, 0.0), strict=True):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=dtype) * scale
    return [parameters[0], torch.nn.Parameter(torch.zeros(4)), *parameters[1:]]  # the second has no gradient


def grads_of(parameters):
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("max_norm", [0.5, 3.0])
def test_clipping_equals_the_official_loop(max_norm):
    ours, theirs = gradients(), gradients()
    norms = clip_per_parameter_(grads_of(ours), max_norm)
    expected = []
    for parameter in theirs:
        if parameter.grad is not None:
            norm = parameter.grad.norm(2)
            expected.append(norm)
            factor = max_norm / (norm + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
    torch.testing.assert_close(norms, torch.stack(expected))
    assert ours[1].grad is None
    for one, other in zip(ours, theirs, strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    assert torch.equal(ours[0].grad, gradients()[0].grad)  # a short one keeps every bit


@pytest.mark.parametrize("off", [None, 0.0])
def test_without_clipping_the_norms_are_measured_all_the_same(off):
    ours = gradients()
    measured = clip_per_parameter_(grads_of(gradients()), 1.0)
    assert torch.equal(clip_per_parameter_(grads_of(ours), off), measured)
    assert torch.equal(ours[2].grad, gradients()[2].grad)


def test_moving_average_equals_the_official_form():
    teacher, student = materialise(make, seed=0, scheme="fan_in"), materialise(make, seed=1, scheme="fan_in")
    before = copy.deepcopy(teacher)
    ema_update_(teacher.parameters(), student.parameters(), 0.9)
    for old, new, target in zip(before.parameters(), teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(new, old * 0.9 + target * (1 - 0.9))
    ema_update_(teacher.parameters(), student.parameters(), 1.0)
    assert not torch.equal(next(teacher.parameters()), next(before.parameters()))


def test_a_frozen_last_layer_neither_moves_nor_decays_nor_gets_moments():
    model = materialise(lambda: make(norm_last_layer=False), seed=0, scheme="fan_in")
    before = {name: parameter.clone() for name, parameter in named(model).items()}
    optimizer = build_optimizer("adamw", model)
    train(model, optimizer, range(2), frozen_until=2)
    moved = {name for name, parameter in named(model).items() if not torch.equal(parameter, before[name])}
    frozen = {"head.last_layer.weight_g", "head.last_layer.weight_v"}
    assert moved == set(before) - frozen
    moments = optimizer_moments(optimizer, named(model))
    assert {name.rpartition(".")[0] for name in moments} == set(before) - frozen


def test_moments_are_named_after_their_parameter():
    model = materialise(make, seed=0, scheme="fan_in")
    optimizer = build_optimizer("adamw", model)
    assert optimizer_moments(optimizer, named(model)) == {}
    train(model, optimizer, range(3))
    moments = optimizer_moments(optimizer, named(model))
    assert moments["backbone.norm.weight.exp_avg"].shape == (16,)
    assert moments["backbone.norm.weight.step"].item() == 3.0
    assert "head.last_layer.weight_g.exp_avg" not in moments  # its length is frozen for good


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_training_goes_on_bit_for_bit_after_a_load(name, stop):
    """The last layer is frozen for three steps: before that it has no moments, and gets them later."""
    straight = materialise(make, seed=0, scheme="fan_in")
    optimizer = build_optimizer(name, straight)
    train(straight, optimizer, range(6), frozen_until=3)

    first = materialise(make, seed=0, scheme="fan_in")
    first_optimizer = build_optimizer(name, first)
    train(first, first_optimizer, range(stop), frozen_until=3)
    second = copy.deepcopy(first)
    second_optimizer = build_optimizer(name, second)
    load_moments(second_optimizer, named(second), optimizer_moments(first_optimizer, named(first)))
    train(second, second_optimizer, range(stop, 6), frozen_until=3)

    for one, other in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    expected, found = (
        optimizer_moments(optimizer, named(straight)),
        optimizer_moments(second_optimizer, named(second)),
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_moments_of_another_optimizer_are_refused_by_lars():
    model = materialise(make, seed=0, scheme="fan_in")
    optimizer = build_optimizer("lars", model)
    for moments in ({"momentum_buffer": torch.zeros(16)}, {"mu": torch.zeros(15)}):
        with pytest.raises(CheckpointError, match=r"backbone\.norm\.bias.*expected"):
            load_moments(optimizer, named(model), {f"backbone.norm.bias.{key}": one for key, one in moments.items()})
    assert optimizer_moments(optimizer, named(model)) == {}


def test_loading_copies_and_replaces_what_was_there():
    model = materialise(make, seed=0, scheme="fan_in")
    optimizer = build_optimizer("adamw", model)
    train(model, optimizer, range(2), frozen_until=2)
    moments = {key: value.clone() for key, value in optimizer_moments(optimizer, named(model)).items()}
    train(model, optimizer, range(2, 4))
    load_moments(optimizer, named(model), moments)
    assert optimizer_moments(optimizer, named(model)).keys() == moments.keys()
    train(model, optimizer, range(4, 5))
    assert moments["backbone.norm.weight.step"].item() == 2.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m | {"backbone.gone.exp_avg": torch.zeros(3)}, "backbone.gone: no trained parameter"),
        (
            lambda m: m | {"head.last_layer.weight_g.exp_avg": torch.zeros(12, 1)},
            "weight_g: no trained parameter",
        ),
        (
            lambda m: {k: v for k, v in m.items() if k != "backbone.norm.bias.exp_avg_sq"},
            "backbone.norm.bias: expec",
        ),
        (lambda m: m | {"backbone.norm.bias.exp_avg": torch.zeros(15)}, "backbone.norm.bias.exp_avg: expec"),
        (
            lambda m: m | {"backbone.norm.bias.exp_avg": torch.zeros(16).double()},
            "backbone.norm.bias.exp_avg: expec",
        ),
        (lambda m: m | {"backbone.norm.bias.momentum_buffer": torch.zeros(16)}, "backbone.norm.bias: expec"),
    ],
)
def test_moments_that_do_not_fit_are_refused_and_nothing_changes(spoil, message):
    model = materialise(make, seed=0, scheme="fan_in")
    optimizer = build_optimizer("adamw", model)
    train(model, optimizer, range(2))
    before = optimizer_moments(optimizer, named(model))
    with pytest.raises(CheckpointError, match=message):
        load_moments(optimizer, named(model), spoil(before))
    after = optimizer_moments(optimizer, named(model))
    assert before.keys() == after.keys()
    assert all(after[key] is before[key] for key in before)
