"""The linear probe: torch's own optimizer and schedule as the reference, and features whose classes are known."""

import pytest
import torch
from test_models_vit import random_images, tiny
from torch import nn

from dino_exp.errors import ConfigError
from dino_exp.evaluation.linear import FeatureRecipe, ProbeRule, feature_recipe, train_probe
from dino_exp.rng import Stream

RULE = ProbeRule(epochs=20, batch_size=32, momentum=0.9, seed=3)


def separable(num: int, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around three corners, apart from each other."""
    labels = torch.arange(num) % 3
    noise = torch.from_numpy(Stream(shift, "test").normal(torch.arange(num).numpy(), num=5)).float()
    return 4 * nn.functional.one_hot(labels, 5) + 0.5 * noise, labels


def probe(lr: float = 0.5, rule: ProbeRule = RULE):
    return train_probe(*separable(90), *separable(60, 1), num_classes=3, lr=lr, rule=rule)


def test_separable_features_are_separated_and_the_same_twice():
    found = probe()
    assert found.top1 == found.best_top1 == 1.0
    assert found.train_loss < 0.1
    assert found == probe()
    assert found != probe(rule=ProbeRule(epochs=20, batch_size=32, momentum=0.9, seed=4))


def test_labels_without_a_pattern_are_not_found():
    features, _ = separable(300)
    labels = torch.from_numpy(Stream(0, "labels").bits(num=300).astype("int64") % 3)
    found = train_probe(features[:200], labels[:200], features[200:], labels[200:], num_classes=3, lr=0.5, rule=RULE)
    assert found.top1 < 0.55


def test_it_is_torchs_sgd_with_a_cosine_an_epoch():
    (features, labels), (test, answers) = separable(90), separable(60, 1)
    classifier = nn.Linear(5, 3)
    weights = Stream(3, "evaluation.linear.init").normal(torch.arange(3).numpy(), num=5)
    with torch.no_grad():
        classifier.weight.copy_(0.01 * torch.from_numpy(weights))
        classifier.bias.zero_()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.02 * 32 / 256, momentum=0.9, weight_decay=0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=0)
    accuracies = []
    for epoch in range(20):
        order = torch.from_numpy(Stream(3, "evaluation.linear.order").permutation(epoch, num=90))
        for chosen in torch.split(order, 32):
            loss = nn.functional.cross_entropy(classifier(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        accuracies.append(float((classifier(test).argmax(dim=1) == answers).double().mean()))
    found = probe(lr=0.02)
    assert found.train_loss == pytest.approx(loss.item(), rel=1e-5)
    assert (found.top1, found.best_top1) == (accuracies[-1], max(accuracies))
    assert found.best_epoch == accuracies.index(max(accuracies)) + 1
    assert max(accuracies) > min(accuracies)


def test_the_official_features_of_small_and_large_models():
    assert feature_recipe(tiny(depth=6)) == FeatureRecipe(num_blocks=4, mean_patch=False)
    assert feature_recipe(tiny()) == FeatureRecipe(num_blocks=2, mean_patch=False)
    wide = tiny(embed_dim=768, num_heads=12)
    assert feature_recipe(wide) == FeatureRecipe(num_blocks=1, mean_patch=True)
    assert feature_recipe(wide, 2, False) == FeatureRecipe(num_blocks=2, mean_patch=False)
    with pytest.raises(ConfigError, match=r"evaluation\.num_blocks=3: the model has 2 blocks"):
        feature_recipe(tiny(), 3)


def test_features_are_class_tokens_side_by_side_and_the_mean_patch():
    model, images = tiny(), random_images(2, 1, 16, 16)
    found = FeatureRecipe(num_blocks=2, mean_patch=True).features(model, images)
    tokens = model.forward_tokens(images)
    assert found.shape == (2, 48)
    assert torch.allclose(found[:, 16:32], model(images), atol=1e-6)
    assert torch.allclose(found[:, 32:], tokens[:, 1:].mean(dim=1))
