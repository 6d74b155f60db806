import copy

import pytest
import torch
from torch.nn import functional

from dino_exp.errors import ConfigError
from dino_exp.models.head import DINOHead, WeightNormLinear
from dino_exp.models.init import materialise


def make(**changes):
    settings = {
        "in_dim": 6,
        "out_dim": 10,
        "hidden_dim": 8,
        "bottleneck_dim": 4,
        "use_bn": False,
        "norm_last_layer": True,
    }
    return DINOHead(**(settings | changes))


def test_parameter_count_of_the_official_head():
    with torch.device("meta"):
        head = make(in_dim=384, out_dim=65536, hidden_dim=2048, bottleneck_dim=256)
    assert sum(parameter.numel() for parameter in head.parameters()) == 22_352_128
    assert head.last_layer.weight_g.shape == (65536, 1)
    assert head.last_layer.weight_v.shape == (65536, 256)


@pytest.mark.parametrize(
    ("changes", "linears", "norms"),
    [
        ({}, (0, 2, 4), ()),
        ({"use_bn": True}, (0, 3, 6), (1, 4)),
        ({"num_layers": 2}, (0, 2), ()),
        ({"num_layers": 4, "use_bn": True}, (0, 3, 6, 9), (1, 4, 7)),
    ],
)
def test_keys_are_the_official_ones(changes, linears, norms):
    expected = {f"mlp.{number}.{kind}" for number in (*linears, *norms) for kind in ("weight", "bias")}
    expected |= {
        f"mlp.{number}.{kind}" for number in norms for kind in ("running_mean", "running_var", "num_batches_tracked")
    }
    expected |= {"last_layer.weight_g", "last_layer.weight_v"}
    assert set(make(**changes).state_dict()) == expected


def test_a_single_layer_leads_straight_to_the_bottleneck():
    assert set(make(num_layers=1).state_dict()) == {
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight_g",
        "last_layer.weight_v",
    }
    with pytest.raises(ConfigError, match="num_layers"):
        make(num_layers=0)


def test_logits_are_cosines_while_the_prototypes_have_length_one():
    head = materialise(make, seed=0, scheme="fan_in").double()
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = functional.cosine_similarity(head.mlp(features)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(features), expected, rtol=1e-12, atol=1e-12)


def test_weight_norm_equals_torch_s_own():
    ours = materialise(lambda: WeightNormLinear(4, 10, train_norms=True), seed=0, scheme="official").double()
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 10, bias=False).double())
    with torch.no_grad():
        ours.weight_g.copy_(torch.rand(10, 1, generator=torch.Generator().manual_seed(1)) + 0.5)
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    rows = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours(rows).square().sum().backward()
    theirs(rows).square().sum().backward()
    torch.testing.assert_close(ours(rows), theirs(rows), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        ours.weight_v.grad, theirs.parametrizations.weight.original1.grad, rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(
        ours.weight_g.grad, theirs.parametrizations.weight.original0.grad, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_norm_last_layer_freezes_the_lengths(norm_last_layer):
    head = materialise(lambda: make(norm_last_layer=norm_last_layer), seed=0, scheme="official")
    assert head.last_layer.weight_g.requires_grad is not norm_last_layer
    assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1))


def test_deepcopy_works():
    head = materialise(lambda: make(use_bn=True), seed=0, scheme="official")
    head(torch.ones(3, 6)).sum().backward()
    other = copy.deepcopy(head)
    rows = torch.eye(6)
    assert torch.equal(head(rows), other(rows))


@pytest.mark.parametrize("train_norms", [True, False])
def test_the_gradient_of_the_prototypes_is_that_of_the_formula(train_norms: bool) -> None:
    layer = WeightNormLinear(5, 7, train_norms=train_norms).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight_v.copy_(torch.randn(7, 5, generator=generator))
        layer.weight_g.copy_(torch.rand(7, 1, generator=generator) + 0.5)
        layer.weight_g[3] = 0.0  # a length that a training may pass through
    rows = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    wanted = [rows, layer.weight_v] + ([layer.weight_g] if train_norms else [])
    plain = rows @ (layer.weight_g * layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)).T
    weights = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((layer(rows) * weights).sum(), wanted)
    theirs = torch.autograd.grad((plain * weights).sum(), wanted)
    torch.testing.assert_close(layer(rows), plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_under_autocast_logits_are_half_and_gradients_whole() -> None:
    layer = WeightNormLinear(16, 32, train_norms=True)
    torch.nn.init.normal_(layer.weight_v)
    rows = torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(rows)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), layer(rows), rtol=0.03, atol=0.03)
    logits.sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
