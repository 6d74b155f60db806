"""Evaluation during training on data of every kind: few images of many, no labels, one class, images of many sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_examples import config
from support.runs import Lab
from torch import Tensor

from dino_exp import build
from dino_exp.attempts.beginning import remarks_on
from dino_exp.data.datasets import ArrayDataset, Indices
from dino_exp.data.images import Images
from dino_exp.dist.ranks import ONE_RANK, Ranks
from dino_exp.errors import ConfigError
from dino_exp.evaluation import knn, pixels
from dino_exp.evaluation.features import Interrupted
from dino_exp.evaluation.panel import Panel, evenly
from dino_exp.evaluation.report import evaluate_features
from dino_exp.loggers.console import is_evaluated
from dino_exp.training.evaluator import Evaluator
from dino_exp.training.parallel import Parallel
from dino_exp.training.state import TrainState

KNN = ("knn_top1", "knn5_top1", "knn_10shot", "knn_1shot")
SMALL = (
    "data=synthetic", "augment=dino", "model.embed_dim=8", "model.depth=1", "model.num_heads=2", "loss.out_dim=16",
    "loss.hidden_dim=16", "loss.bottleneck_dim=8", "evaluation.batch_size=7", "data.local_size=8", "data.patch_size=8",
)  # fmt: skip


def colours(name: str, num: int, classes: int, side: int = 12) -> ArrayDataset:
    """Images of one colour and noise, whose classes can be told apart, now and then."""
    draws, labels = np.random.default_rng(num), np.arange(num) % max(classes, 1)
    pixels = draws.integers(0, 160, (num, 3, side, side)) + 24 * (labels % 4)[:, None, None, None]
    return ArrayDataset(
        name=name,
        version="1",
        num_classes=classes,
        images_NCHW=pixels.astype(np.uint8),
        labels_N=labels.astype(np.int64),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Told(ArrayDataset):
    """Says which images it was asked for."""

    asked: list[int] = field(default_factory=list)
    most: list[int] = field(default_factory=lambda: [0])

    def images(self, indices: Indices) -> Images:
        self.asked.extend(indices.tolist())
        self.most[0] = max(self.most[0], len(indices))
        return super().images(indices)


@dataclass(frozen=True, kw_only=True, eq=False)
class OneSmaller(ArrayDataset):
    """The last image fills its canvas in height only."""

    def images(self, indices: Indices) -> Images:
        whole = super().images(indices)
        sizes = whole.sizes_B2.copy()
        sizes[indices == len(self) - 1, 1] -= 4
        return Images(whole.pixels_BCHW, sizes)


def as_kind(kind: type[ArrayDataset], dataset: ArrayDataset) -> Any:
    return kind(
        name=dataset.name, version="1", num_classes=dataset.num_classes,
        images_NCHW=dataset.images_NCHW, labels_N=dataset.labels_N,
    )  # fmt: skip


def evaluator_of(train: Any, val: Any, *words: str, image_size: int = 16) -> tuple[Evaluator, TrainState]:
    made = config(*SMALL, f"data.image_size={image_size}", *words)
    augment, schedules = build.build_augment(made), build.build_schedules(made, 10)
    state = build.build_state(made, 3, torch.device("cpu"))
    return build.build_evaluator(made, build.Data(train, val), augment, schedules), state


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("num", "wanted", "expected"),
    [(5, None, [0, 1, 2, 3, 4]), (5, 5, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (10, 3, [0, 3, 6]), (7, 1, [0])],
)
def test_images_are_spread_evenly(num: int, wanted: int | None, expected: list[int]) -> None:
    assert evenly(num, wanted).tolist() == expected


def test_of_sorted_classes_each_has_its_share() -> None:
    labels = np.repeat(np.arange(100), np.arange(100, 200))
    for wanted in (100, 1000, 9_999):
        ids = evenly(len(labels), wanted)
        assert len(set(ids.tolist())) == wanted
        shares = np.bincount(labels[ids], minlength=100) / (wanted / len(labels))
        assert np.abs(shares - np.arange(100, 200)).max() <= len(labels) / wanted


@pytest.mark.parametrize(("train", "val"), [(None, None), (64, 11)])
def test_only_the_images_of_the_panel_are_looked_at_and_few_at_once(train: int | None, val: int | None) -> None:
    sets = as_kind(Told, colours("x/train", 100, 4)), as_kind(Told, colours("x/val", 30, 4))
    words = (f"evaluation.train_images={train or 'null'}", f"evaluation.val_images={val or 'null'}")
    evaluator, state = evaluator_of(*sets, *words)
    assert list(evaluator.baselines(state, never)) == [f"{what}_{name}" for what in ("init", "pixel") for name in KNN]
    assert list(evaluator.measure(state, never)) == [*KNN, "val_loss"] == list(evaluator.panel.metrics)
    for dataset, num in zip(sets, (train or 100, val or 30), strict=True):
        assert set(dataset.asked) == set(evenly(len(dataset), num).tolist())
        assert dataset.most == [7]


def test_what_is_measured_is_that_of_the_panel_alone() -> None:
    train, val = colours("x/train", 100, 4), colours("x/val", 30, 4)
    evaluator, state = evaluator_of(train, val, "evaluation.train_images=64", "evaluation.val_images=11")
    chosen = [replace_images(part, evenly(len(part), num)) for part, num in ((train, 64), (val, 11))]
    alone, _ = evaluator_of(*chosen)
    found, expected = evaluator.measure(state, never), alone.measure(state, never)
    assert {name: found[name] for name in KNN} == {name: expected[name] for name in KNN}
    assert found["val_loss"] != expected["val_loss"]  # an image has the crops of its number in the whole data set
    assert evaluator.baselines(state, never) == alone.baselines(state, never)


def replace_images(dataset: ArrayDataset, ids: Indices) -> ArrayDataset:
    return replace(dataset, images_NCHW=dataset.images_NCHW[ids], labels_N=dataset.labels_N[ids])


def of_pixels(train: ArrayDataset, val: ArrayDataset, features: list[Tensor]) -> dict[str, float]:
    labels = [torch.from_numpy(part.labels_N) for part in (train, val)]
    return {
        f"pixel_{name}": value
        for name, value in evaluate_features(features[0], labels[0], features[1], labels[1], seed=0).items()
    }


def test_pixels_of_small_images_are_taken_as_they_are() -> None:
    train, val = colours("x/train", 64, 4, side=32), colours("x/val", 30, 4, side=32)
    evaluator, state = evaluator_of(train, val)
    found = evaluator.baselines(state, never)
    at_once = [torch.from_numpy(part.images_NCHW).flatten(1).float() for part in (train, val)]
    expected = of_pixels(train, val, at_once)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(("kind", "side"), [(OneSmaller, 24), (ArrayDataset, 33), (ArrayDataset, 100)])
def test_pixels_of_large_or_unlike_images_are_those_of_the_reduced_view(kind: type[ArrayDataset], side: int) -> None:
    train, val = colours("x/train", 64, 4, side), as_kind(kind, colours("x/val", 30, 4, side))
    evaluator, state = evaluator_of(train, val, image_size=64)
    views = [evaluator.clean(part.images(np.arange(len(part)))) for part in (train, val)]
    reduced = [view.unflatten(3, (32, 2)).unflatten(2, (32, 2)).mean(dim=(3, 5)).flatten(1) for view in views]
    found, expected = evaluator.baselines(state, never), of_pixels(train, val, reduced)
    assert {name: found[name] for name in expected} == expected
    assert pixels.reduced_pixels(views[0]).shape == (64, 3 * 32 * 32)


def test_views_of_32_pixels_and_less_stay_as_they_are() -> None:
    views = torch.arange(2 * 3 * 16 * 16.0).reshape(2, 3, 16, 16)
    assert torch.equal(pixels.reduced_pixels(views), views.flatten(1))


def test_pixels_are_compared_with_so_many_images_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_exp.training.evaluator.MOST_IMAGES", 40)
    train, val = as_kind(Told, colours("x/train", 64, 4)), colours("x/val", 30, 4)
    evaluator, state = evaluator_of(train, val)
    found = evaluator._knn_of_pixels(state, never)
    assert "knn_1shot" in found
    assert sorted(train.asked) == evenly(64, 40).tolist()


@pytest.mark.parametrize(("classes", "has"), [(0, "no labels"), (1, "one class only")])
def test_without_classes_there_is_the_loss_alone(classes: int, has: str) -> None:
    evaluator, state = evaluator_of(colours("x/train", 12, classes), colours("x/val", 9, classes))
    assert evaluator.baselines(state, never) == {}
    found = evaluator.measure(state, never)
    assert list(found) == ["val_loss"] == list(evaluator.panel.metrics)
    assert found["val_loss"] > 0
    assert is_evaluated(found)
    assert not is_evaluated({"step": 1, "loss": 2.0})
    told = remarks_on(evaluator.panel, config().checkpoint.keep)
    assert told[0].startswith(f"x/train has {has}: there is no k-NN")
    assert "checkpoint.keep.metric=knn_top1 is not among what is measured (val_loss)" in told[1]
    assert "checkpoint.keep.metric=val_loss checkpoint.keep.mode=min" in told[1]
    assert "misleads" in told[1]


def test_what_is_measured_gives_no_remark() -> None:
    panel = Panel(train_set=colours("x/train", 64, 4), val_set=colours("x/val", 30, 4))
    for metric in (*KNN, "val_loss"):
        assert remarks_on(panel, config(f"checkpoint.keep.metric={metric}").checkpoint.keep) == []
    no_labels = Panel(train_set=colours("x/train", 64, 0), val_set=colours("x/val", 30, 0))
    keep = config(
        "checkpoint.keep.metric=val_loss", "checkpoint.keep.mode=min", "checkpoint.keep.also_best=['knn5_top1:max:1']"
    ).checkpoint.keep
    assert [text[:52] for text in remarks_on(no_labels, keep)[1:]] == [
        "checkpoint.keep.also_best: knn5_top1:max:1 is not am"
    ]


def test_few_labels_are_measured_where_every_class_has_them() -> None:
    train = colours("x/train", 64, 8)  # eight of each
    evaluator, state = evaluator_of(train, colours("x/val", 30, 8))
    assert evaluator.panel.metrics == ("knn_top1", "knn5_top1", "knn_1shot", "val_loss")
    assert list(evaluator.measure(state, never)) == list(evaluator.panel.metrics)
    (told,) = evaluator.panel.remarks()
    assert told.startswith("knn_10shot is not measured: a class has fewer than 10 of the 64 training images of x/train")


def test_no_held_out_images_and_too_few_training_images_are_refused() -> None:
    train, val = colours("x/train", 64, 4), colours("x/val", 30, 4)
    with pytest.raises(ConfigError, match=r"x/val has no images.*evaluation\.every_epochs=null"):
        Panel(train_set=train, val_set=replace_images(val, np.arange(0)))
    with pytest.raises(ConfigError, match="takes the 20 nearest training images, and compares with 19 of x/train"):
        Panel(train_set=replace_images(train, np.arange(19)), val_set=val)
    Panel(train_set=replace_images(train, np.arange(20)), val_set=val)
    with pytest.raises(ConfigError, match=r"evaluation\.train_images: expected at least 20, got 19"):
        config("evaluation.train_images=19")


def test_baselines_can_be_interrupted_while_pixels_are_read() -> None:
    evaluator, state = evaluator_of(colours("x/train", 64, 4), colours("x/val", 30, 4))
    asked = []

    def third_time() -> bool:
        asked.append(1)
        return len(asked) == 3

    with pytest.raises(Interrupted):
        evaluator.baselines(state, third_time)
    assert len(asked) == 3


def test_few_similarities_at_once_give_the_same_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0)
    train, test = (torch.from_numpy(draws.normal(size=(num, 8))).float() for num in (300, 200))
    labels = torch.arange(300) % 7
    whole = knn.knn_predict(train, labels, test, k=5)
    monkeypatch.setattr(knn, "_MOST_AT_ONCE", 1000)
    assert torch.equal(knn.knn_predict(train, labels, test, k=5), whole)
    assert [knn._chunk(num) for num in (3, 300, 100_000)] == [256, 3, 1]


@dataclass(frozen=True)
class Spread(Parallel):
    """Models whole on every rank."""

    of: Ranks

    @property
    def ranks(self) -> Ranks:
        return self.of


def measured(ranks: Ranks) -> dict[str, float]:
    """Everything that an evaluator measures on images of which one does not fill its canvas."""
    train, val = colours("x/train", 90, 4), as_kind(OneSmaller, colours("x/val", 30, 4))
    evaluator, state = evaluator_of(train, val, "evaluation.train_images=50", "evaluation.val_images=null")
    evaluator = replace(evaluator, parallel=Spread(ranks))
    return evaluator.baselines(state, never) | evaluator.measure(state, never)


def test_three_ranks_measure_what_one_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert Lab(tmp_path).call_together(3, "measured_together") == measured(ONE_RANK)
