import numpy as np
import pytest
import torch
from torch import nn

from dino_exp.dino.drop_path import drop_scales
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.errors import ConfigError
from dino_exp.models.head import DINOHead
from dino_exp.models.init import materialise
from dino_exp.models.vit import VisionTransformer

DEPTH = 3


def build(*, use_bn=False):
    return MultiCropModel(
        VisionTransformer(image_size=16, patch_size=4, in_channels=1, embed_dim=16, depth=DEPTH, num_heads=2),
        DINOHead(in_dim=16, out_dim=12, hidden_dim=24, bottleneck_dim=8, use_bn=use_bn, norm_last_layer=True),
    )


def crops(images=3):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(images, 1, size, size, generator=generator) for size in (16, 16, 8, 8, 8)]


class Recorder(nn.Module):
    """A backbone that notes the batches it is given and passes on the mean of each image."""

    def __init__(self):
        super().__init__()
        self.batches, self.drops = [], []

    def forward(self, images, drop):
        self.batches.append([tuple(group.shape) for group in images])
        self.drops.append(drop)
        return torch.cat([group.mean((1, 2, 3)) for group in images])[:, None]


def test_one_backbone_pass_with_a_batch_per_resolution_and_rows_in_the_order_of_the_crops():
    backbone, given = Recorder(), crops()
    logits, features = MultiCropModel(backbone, nn.Identity())(given)
    assert backbone.batches == [[(6, 1, 16, 16), (9, 1, 8, 8)]]
    assert logits.shape == features.shape == (5, 3, 1)
    for view, crop in enumerate(given):
        assert torch.equal(features[view, :, 0], crop.mean((1, 2, 3)))


def test_equal_widths_that_do_not_follow_each_other_stay_apart():
    backbone = Recorder()
    first, _, local, *_ = crops()
    MultiCropModel(backbone, nn.Identity())([first, local, first])
    assert [shape[-1] for shape in backbone.batches[0]] == [16, 8, 16]


def test_all_crops_together_equal_each_crop_alone():
    model, given = materialise(build, seed=0, scheme="fan_in").double(), [c.double() for c in crops()]
    logits, features = model(given)
    assert logits.shape == (5, 3, 12)
    assert features.shape == (5, 3, 16)
    for view, crop in enumerate(given):
        alone = model.backbone(crop)
        torch.testing.assert_close(features[view], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logits[view], model.head(alone), rtol=1e-12, atol=1e-12)


def test_batch_norm_of_the_head_sees_all_crops_at_once():
    model = materialise(lambda: build(use_bn=True), seed=0, scheme="fan_in")
    model(crops())
    assert model.head.mlp[1].num_batches_tracked.item() == 1


def test_drop_scales_reach_their_crop_and_image():
    model, given = materialise(build, seed=0, scheme="fan_in"), crops()
    scales = torch.ones(DEPTH, 2, 5, 3)
    _, plain = model(given, None)
    _, ones = model(given, scales)
    assert torch.equal(plain, ones)
    scales[1, 0, 3, 2] = 0.0
    _, dropped = model(given, scales)
    changed = (dropped != plain).any(-1)
    assert changed.nonzero().tolist() == [[3, 2]]


def test_dropping_every_branch_leaves_the_embedding():
    model = materialise(build, seed=0, scheme="fan_in").backbone
    image = crops()[0]
    out = model(image, torch.zeros(DEPTH, 2, 3))
    expected = model.norm(model.cls_token[:, 0] + model.pos_embed[:, 0]).expand(3, -1)
    assert torch.equal(out, expected)


def draw(**changes):
    settings = {"seed": 0, "step": 7, "sample_ids_B": [5, 900, 31], "num_crops": 4, "rate": 0.4, "depth": 6}
    return drop_scales(**(settings | changes))


def test_drop_scales_are_zero_or_one_over_the_probability_to_keep():
    scales = draw(sample_ids_B=np.arange(500))
    assert scales.shape == (6, 2, 4, 500)
    assert scales.dtype == torch.float32
    for layer, rate in enumerate(np.linspace(0, 0.4, 6)):
        values = torch.unique(scales[layer]).tolist()
        assert values == pytest.approx([1.0] if layer == 0 else [0.0, 1 / (1 - rate)])
        assert (scales[layer] == 0).float().mean().item() == pytest.approx(rate, abs=0.03)


def test_drop_scales_of_a_sample_do_not_depend_on_its_batch():
    scales = draw()
    assert torch.equal(draw(sample_ids_B=[31]), scales[..., 2:])
    assert torch.equal(draw(num_crops=2), scales[:, :, :2])


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 8}, {"sample_ids_B": [6, 901, 32]}])
def test_drop_scales_differ_between_seeds_steps_and_samples(change):
    assert not torch.equal(draw(**change, depth=24), draw(depth=24))


def test_rate_zero_drops_nothing_and_a_rate_of_one_is_refused():
    assert draw(rate=0.0) is None
    with pytest.raises(ConfigError, match="drop_path_rate"):
        draw(rate=1.0)
