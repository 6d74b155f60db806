"""Taking features leaves no trace in the model."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dino_exp.evaluation.features import Interrupted, extract_features, frozen


def model() -> nn.Sequential:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    layers.train()
    layers[2].eval()  # a mixture, which must come back as it was
    return layers


def batches(num: int = 3) -> Iterator[Tensor]:
    for number in range(num):
        yield torch.arange(48.0).reshape(4, 3, 2, 2) * (number + 1)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def test_features_come_in_order_without_gradients() -> None:
    layers = model()
    features = extract_features(layers, layers, batches())
    assert features.shape == (12, 5)
    assert not features.requires_grad
    assert torch.equal(features[4:8], extract_features(layers, layers, list(batches())[1:2]))


def test_modes_and_buffers_are_as_before() -> None:
    layers = model()
    before, buffers = modes(layers), {name: value.clone() for name, value in layers.state_dict().items()}
    generator = torch.get_rng_state()
    extract_features(layers, layers, batches())
    assert modes(layers) == before
    assert all(torch.equal(value, buffers[name]) for name, value in layers.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled()


def test_an_error_puts_the_modes_back_too() -> None:
    layers = model()
    before = modes(layers)
    with pytest.raises(RuntimeError, match="shapes"):
        extract_features(layers, layers, [torch.zeros(2, 5)])
    assert modes(layers) == before
    assert torch.is_grad_enabled()


def test_it_stops_between_batches_when_asked() -> None:
    layers, asked, given = model(), [], []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    def counted() -> Iterator[Tensor]:
        for batch in batches(10):
            given.append(batch)
            yield batch

    before = modes(layers)
    with pytest.raises(Interrupted):
        extract_features(layers, layers, counted(), should_stop=should_stop)
    assert len(given) == 3
    assert modes(layers) == before


def test_frozen_keeps_the_mode_of_each_part() -> None:
    layers = model()
    with frozen(layers):
        assert not any(modes(layers))
    assert modes(layers) == [True, True, True, False, True]
