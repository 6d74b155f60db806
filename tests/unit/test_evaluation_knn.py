"""k-NN against a plain implementation, against the pixel baselines of record, and with ties."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_exp.data.datasets import ArrayDataset
from dino_exp.data.digits import load_digits_split
from dino_exp.errors import ConfigError
from dino_exp.evaluation.knn import few_shot_accuracy, knn_accuracies, knn_accuracy, knn_predict
from dino_exp.evaluation.report import evaluate_features, prefixed
from dino_exp.rng import Stream


def normal(purpose: str, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(Stream(0, purpose).normal(np.arange(rows), num=columns)).float()


def pixels(dataset: ArrayDataset) -> tuple[Tensor, Tensor]:
    everything = np.arange(len(dataset))
    return dataset.images(everything).pixels_BCHW.flatten(1).float(), dataset.labels(everything)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *pixels(load_digits_split("train")), *pixels(load_digits_split("val"))


def plain_knn(train: Tensor, labels: Tensor, test: Tensor, k: int, temperature: float = 0.07) -> list[int]:
    """The definition, one image after the other, in float64."""
    train, test = (np.asarray(x.double() / x.double().norm(dim=1, keepdim=True)) for x in (train, test))
    predicted = []
    for image in test:
        similarity = train @ image
        votes = np.zeros(int(labels.max()) + 1)
        for neighbour in np.argsort(-similarity, kind="stable")[:k]:
            votes[labels[neighbour]] += np.exp((similarity[neighbour] - similarity.max()) / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_it_is_the_weighted_vote_of_the_nearest(k: int) -> None:
    train, test = normal("train", 200, 8), normal("test", 300, 8)
    labels = torch.arange(200) % 7
    assert knn_predict(train, labels, test, k=k).tolist() == plain_knn(train, labels, test, k)


@pytest.mark.parametrize("temperature", [0.012, 0.0113, 0.011, 0.001, 1e-6, 1e-60])
def test_the_votes_of_a_low_temperature_are_neither_infinite_nor_all_zero(temperature: float) -> None:
    train = normal("train", 200, 8)
    test = train[:100] + 0.05 * normal("test", 100, 8)
    labels = torch.arange(200) % 7
    found = knn_predict(train, labels, test, k=20, temperature=temperature).tolist()
    assert found == plain_knn(train, labels, test, 20, temperature)


def test_several_numbers_of_neighbours_are_each_as_alone(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    neighbours = (5, 200, 1, 20)
    assert knn_accuracies(*digits, neighbours=neighbours) == [knn_accuracy(*digits, k=k) for k in neighbours]
    with pytest.raises(ConfigError, match="k = 1438"):
        knn_accuracies(*digits, neighbours=(5, 1438))


def test_the_pixel_baselines_of_record(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    assert knn_accuracy(*digits, k=20) == pytest.approx(0.975, abs=0.0015)
    assert knn_accuracy(*digits, k=5) == pytest.approx(0.986, abs=0.0015)


@pytest.mark.parametrize(("labels_per_class", "expected"), [(10, 0.900), (5, 0.846), (1, 0.644)])
def test_the_few_label_baselines_of_record(
    digits: tuple[Tensor, Tensor, Tensor, Tensor], labels_per_class: int, expected: float
) -> None:
    found = few_shot_accuracy(*digits, labels_per_class=labels_per_class, seed=0)
    assert found == pytest.approx(expected, abs=0.02)


def test_the_number_of_test_images_does_not_matter() -> None:
    train, labels, test = normal("train", 100, 8), torch.arange(100) % 3, normal("test", 600, 8)
    whole = knn_predict(train, labels, test, k=5)
    assert torch.equal(torch.cat([knn_predict(train, labels, part, k=5) for part in test.split(99)]), whole)
    assert knn_predict(train, labels, test[:1], k=5).shape == (1,)


def test_equally_near_images_are_taken_in_order() -> None:
    train = torch.ones(6, 4)
    assert knn_predict(train, torch.tensor([2, 0, 0, 0, 1, 1]), torch.ones(1, 4), k=1).tolist() == [2]
    assert knn_predict(train, torch.tensor([2, 2, 0, 0, 0, 0]), torch.ones(1, 4), k=3).tolist() == [2]
    opposite = -torch.ones(1, 4)  # similarities below zero are ordered the other way round in their bits
    assert knn_predict(train, torch.tensor([2, 0, 0, 0, 1, 1]), opposite, k=1).tolist() == [2]
    assert knn_predict(torch.eye(4), torch.tensor([3, 1, 0, 0]), -torch.eye(4)[2:3], k=1).tolist() == [3]


def test_of_classes_with_equal_votes_the_first_wins() -> None:
    assert knn_predict(torch.ones(4, 2), torch.tensor([3, 1, 3, 1]), torch.ones(1, 2), k=4).tolist() == [1]


def test_scaling_features_changes_nothing(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    train, labels, test, _ = digits
    assert torch.equal(knn_predict(4 * train, labels, test / 8, k=20), knn_predict(train, labels, test, k=20))


@pytest.mark.parametrize("k", [0, 11])
def test_more_neighbours_than_images_are_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=rf"k = {k} needs as many training images, and there are 10"):
        knn_predict(torch.ones(10, 2), torch.zeros(10, dtype=torch.int64), torch.ones(1, 2), k=k)


def test_too_few_labels_are_refused() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4)
    with pytest.raises(ConfigError, match="class 1 has 4 training images, and 10 are needed"):
        few_shot_accuracy(torch.ones(14, 2), labels, torch.ones(1, 2), labels[:1], labels_per_class=10, seed=0)


def test_few_labels_are_drawn_by_the_seed_alone(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    found = [evaluate_features(*digits, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["knn_1shot"] != found[2]["knn_1shot"]
    assert found[0]["knn_top1"] == found[2]["knn_top1"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


def test_metrics_have_their_fixed_names(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    metrics = evaluate_features(*digits, seed=0)
    assert list(metrics) == ["knn_top1", "knn5_top1", "knn_10shot", "knn_1shot"]
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in metrics.values())
    assert list(prefixed("pixel_", metrics))[:2] == ["pixel_knn_top1", "pixel_knn5_top1"]
    assert list(prefixed("init_", metrics).values()) == list(metrics.values())
