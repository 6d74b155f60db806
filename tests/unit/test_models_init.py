import pytest
import torch
from torch import nn

from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.errors import ConfigError
from dino_exp.models import init
from dino_exp.models.head import DINOHead
from dino_exp.models.init import initialise, materialise
from dino_exp.models.vit import VisionTransformer


def make():
    backbone = VisionTransformer(image_size=32, patch_size=4, in_channels=3, embed_dim=128, depth=2, num_heads=4)
    head = DINOHead(in_dim=128, out_dim=512, hidden_dim=256, bottleneck_dim=64, use_bn=True, norm_last_layer=False)
    return MultiCropModel(backbone, head)


@pytest.fixture(scope="module")
def official():
    return materialise(make, seed=0, scheme="official").state_dict()


@pytest.fixture(scope="module")
def fan_in():
    return materialise(make, seed=0, scheme="fan_in").state_dict()


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def is_linear(name):
    layers = ("attn.", "mlp.fc", "head.mlp.0", "head.mlp.3", "head.mlp.6")
    return name.endswith(".weight") and any(layer in name for layer in layers)


def test_official_statistics(official):
    for name, values in official.items():
        if is_linear(name) or name.endswith(("pos_embed", "cls_token")):
            tolerance = 0.15 if name.endswith("cls_token") else 0.03
            assert values.std().item() == pytest.approx(0.02, rel=tolerance), name
            assert abs(values.mean().item()) < 0.006, name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert torch.count_nonzero(values) == 0, name


@pytest.mark.parametrize(
    ("name", "fan_in_count"),
    [
        ("backbone.patch_embed.proj.weight", 48),
        ("backbone.patch_embed.proj.bias", 48),
        ("head.last_layer.weight_v", 64),
    ],
)
def test_torch_defaults_are_uniform_up_to_one_over_root_fan_in(official, name, fan_in_count):
    values, bound = official[name], fan_in_count**-0.5
    assert values.abs().max().item() <= bound
    assert values.abs().max().item() > 0.95 * bound
    assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_constants(official):
    for name, values in official.items():
        if "norm" in name or name.startswith(("head.mlp.1.", "head.mlp.4.")):
            expected = 1 if name.endswith(("weight", "running_var")) else 0
            assert torch.equal(values, torch.full_like(values, expected)), name
    assert torch.equal(official["head.last_layer.weight_g"], torch.ones(512, 1))


def test_fan_in_changes_linear_weights_and_positions_only(official, fan_in):
    changed = {name for name in official if not torch.equal(official[name], fan_in[name])}
    assert changed == {name for name in official if is_linear(name)} | {"backbone.pos_embed"}
    for name in changed - {"backbone.pos_embed"}:
        assert fan_in[name].std().item() == pytest.approx(fan_in[name].shape[1] ** -0.5, rel=0.03), name
    assert fan_in["backbone.pos_embed"].std().item() == pytest.approx(0.2, rel=0.03)


def test_same_seed_same_bits_whatever_torch_s_generator(official):
    torch.manual_seed(999)
    assert equal(materialise(make, seed=0, scheme="official").state_dict(), official)


def test_torch_s_generator_is_left_alone():
    before = torch.get_rng_state()
    materialise(make, seed=0, scheme="official")
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_values(official):
    other = materialise(make, seed=1, scheme="official").state_dict()
    drawn = [name for name in official if len(torch.unique(official[name])) > 1]
    assert len(drawn) > 10
    assert not any(torch.equal(official[name], other[name]) for name in drawn)


def test_equal_shapes_get_different_values(official):
    assert not torch.equal(official["backbone.blocks.0.attn.qkv.weight"], official["backbone.blocks.1.attn.qkv.weight"])


def test_every_parameter_and_buffer_is_set():
    model = make()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(7)
    initialise(model, seed=0, scheme="official")
    assert not any((tensor == 7).any() for tensor in model.state_dict().values())


def test_values_do_not_depend_on_what_is_built_around_them(official):
    alone = nn.Module()
    alone.backbone = materialise(lambda: make().backbone, seed=5, scheme="fan_in")
    initialise(alone, seed=0, scheme="official")
    assert all(torch.equal(values, official[name]) for name, values in alone.state_dict().items())


def test_large_tensors_are_drawn_in_parts_without_repeating(monkeypatch):
    monkeypatch.setattr(init, "_CHUNK", 1000)
    values = materialise(lambda: nn.Linear(50, 50), seed=0, scheme="official").weight.flatten()
    assert len(torch.unique(values)) > 2480
    assert not torch.equal(values[:1000], values[1000:2000])


def test_the_normal_is_cut_at_two():
    values = torch.from_numpy(init._normal(1.0)(torch.linspace(1e-9, 1 - 1e-9, 1001).double().numpy()))
    assert values.abs().max().item() == pytest.approx(2.0, abs=1e-6)
    assert values.std().item() == pytest.approx(0.8796, abs=0.005)  # of a standard normal cut at two


def test_unknown_scheme_and_unknown_module_are_refused():
    with pytest.raises(ConfigError, match=r"init\.scheme"):
        initialise(nn.Linear(2, 2), seed=0, scheme="xavier")
    with pytest.raises(TypeError, match=r"1\.weight of a Embedding"):
        initialise(nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2)), seed=0, scheme="official")


def test_what_a_block_adds_is_smaller_in_a_deep_model():
    def deep():
        return VisionTransformer(image_size=16, patch_size=4, in_channels=1, embed_dim=128, depth=8, num_heads=4)

    weights = materialise(deep, seed=0, scheme="fan_in").state_dict()
    for name, scale in (("attn.qkv", 1.0), ("mlp.fc1", 1.0), ("attn.proj", 0.5), ("mlp.fc2", 0.5)):
        values = weights[f"blocks.3.{name}.weight"]
        assert values.std().item() == pytest.approx(scale * values.shape[1] ** -0.5, rel=0.03), name
