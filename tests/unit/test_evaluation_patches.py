"""Patch colours: principal components of constructed features, with the answer known."""

import torch
from test_models_vit import random_images, tiny

from dino_exp.evaluation.patches import patch_colours, patch_tokens


def constructed() -> torch.Tensor:
    """(2, 3, 5, 4) features: variances 100, 25, 4 along dimensions 2, 0, 3, uncorrelated; none along 1."""
    at = torch.arange(30, dtype=torch.float64)
    waves = [torch.cos(2 * torch.pi * turns * (at + 0.5) / 30) for turns in (1, 2, 3)]
    features = torch.stack([5 * waves[1], torch.zeros(30), 10 * waves[0], 2 * waves[2]], dim=1) + 7
    return features.reshape(2, 3, 5, 4)


def test_the_components_of_constructed_features_become_the_colours():
    features = constructed()
    found = patch_colours(features)
    assert found.colours.shape == (2, 3, 5, 3)
    assert found.colours.min() == 0
    assert found.colours.max() == 1
    assert torch.allclose(found.explained, torch.tensor([100.0, 25.0, 4.0], dtype=torch.float64) / 129)
    for colour, dimension in enumerate((2, 0, 3)):
        values, seen = features[..., dimension].flatten(), found.colours[..., colour].flatten().double()
        low, high = values.quantile(0.01), values.quantile(0.99)
        assert torch.allclose(seen, ((values - low) / (high - low)).clamp(0, 1), atol=1e-6)


def test_the_signs_do_not_depend_on_the_order_of_the_images():
    features = constructed()
    flipped = patch_colours(features.flip(0)).colours.flip(0)
    assert torch.allclose(flipped, patch_colours(features).colours, atol=1e-6)


def test_one_odd_patch_does_not_take_all_of_the_range():
    features = torch.rand(4, 10, 10, 3, generator=torch.Generator().manual_seed(0))
    features[0, 0, 0] += 1000
    assert patch_colours(features).colours[..., 0].std() > 0.2


def test_what_has_no_variance_is_grey():
    assert patch_colours(torch.ones(2, 3, 3, 5)).colours.unique().tolist() == [0.5]
    narrow = patch_colours(torch.linspace(0, 1, 12).reshape(1, 3, 4, 1))
    assert narrow.explained.tolist() == [1, 0, 0]
    assert narrow.colours[..., 1:].unique().tolist() == [0.5]
    assert len(narrow.colours[..., 0].unique()) > 8


def test_patch_tokens_are_those_of_the_model_without_the_class_token():
    model, images = tiny(), random_images(2, 1, 16, 24)
    tokens = patch_tokens(model, images)
    assert tokens.shape == (2, 4, 6, 16)
    assert torch.equal(tokens[1, 2, 3], model.forward_tokens(images)[1, 1 + 2 * 6 + 3])
