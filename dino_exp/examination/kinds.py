"""The five evaluations: each makes metrics, what more there is to say, and perhaps a picture of one subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dino_exp.config.evaluate import (
    AttentionConfig,
    CropsConfig,
    FeaturesConfig,
    KindConfig,
    KnnConfig,
    LinearConfig,
    listed,
)
from dino_exp.data.crops import NUM_GLOBAL
from dino_exp.data.datasets import Dataset, Indices
from dino_exp.errors import ConfigError
from dino_exp.evaluation.attention import class_attention
from dino_exp.evaluation.knn import labelled
from dino_exp.evaluation.linear import ProbeResult, ProbeRule, feature_recipe, train_probe
from dino_exp.evaluation.panel import evenly
from dino_exp.evaluation.patches import patch_colours, patch_tokens
from dino_exp.evaluation.report import evaluate_features
from dino_exp.examination.subject import Subject

if TYPE_CHECKING:
    from dino_exp.analysis.style import Picture

MOST_IMAGES = 64  # of a picture
_AT_ONCE = 8  # images of a forward pass that may be much larger than in training
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What an evaluation found. `metrics` have their names of record; `details` are JSON; `note` is for people."""

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    picture: Picture | None = None
    note: str | None = None


def examine(subject: Subject, kind: KindConfig) -> Findings:
    """Evaluate a subject. Raises ConfigError for what the data or the model does not have, CorruptCheckpointError."""
    return _KINDS[kind.name](subject, kind)


def _knn(subject: Subject, kind: KnnConfig) -> Findings:
    labels = _labels(subject, kind.name)
    neighbours, few = listed(kind.k), listed(kind.labels_per_class)
    if not neighbours + few:
        raise ConfigError("evaluation.k and evaluation.labels_per_class are both []: there is nothing to measure")
    parts, wanted = (subject.data.train, subject.data.val), (kind.train_images, kind.val_images)
    ids = [evenly(len(part), num) for part, num in zip(parts, wanted, strict=True)]
    bank_labels, val_labels = (of_part[chosen] for of_part, chosen in zip(labels, ids, strict=True))
    _check_counts(parts[0], bank_labels, neighbours, few)
    batch = subject.usual_batch if kind.batch_size is None else kind.batch_size
    train, val = (subject.features(subject.model, part, batch, chosen) for part, chosen in zip(parts, ids, strict=True))
    metrics = evaluate_features(
        train, bank_labels, val, val_labels,
        seed=subject.recorded.seed,
        neighbours=neighbours,
        temperature=kind.temperature,
        labels_per_class=few,
        draws=kind.draws,
    )  # fmt: skip
    details = {"forward_batch": batch, "train_images": len(ids[0]), "val_images": len(ids[1])}
    return Findings(metrics=metrics, details=details, note=_note_of_other_images(subject, wanted))


def _note_of_other_images(subject: Subject, wanted: tuple[int | None, int | None]) -> str | None:
    """Where the training measured on other images than this evaluation: how to have its numbers."""
    if wanted == subject.usual_images:
        return None
    as_in_training = " ".join(
        f"evaluation.{name}={'null' if num is None else num}"
        for name, num in zip(("train_images", "val_images"), subject.usual_images, strict=True)
    )
    return f"the training measured on other images; for the numbers of its rows: {as_in_training}"


def _linear(subject: Subject, kind: LinearConfig) -> Findings:
    labels = _labels(subject, kind.name)
    rates, few = listed(kind.lr), listed(kind.labels_per_class)
    if not rates:
        raise ConfigError("evaluation.lr=[]: expected one learning rate or more, such as evaluation.lr=[0.001,0.1]")
    _check_counts(subject.data.train, labels[0], (), few)
    recipe = feature_recipe(subject.model, kind.num_blocks, kind.mean_patch)
    parts, batch = (subject.data.train, subject.data.val), subject.usual_batch
    train, val = (
        subject.features(lambda images: recipe.features(subject.model, images), part, batch) for part in parts
    )
    probes = _Probes(subject, kind, val, labels[1], len(rates) * (1 + len(few) * kind.draws))
    results = [probes.train(train, labels[0], lr) for lr in rates]
    chosen = max(results, key=lambda result: result.top1)
    metrics = {"linear_top1": chosen.top1, "linear_best_top1": max(result.best_top1 for result in results)}
    details: dict[str, Any] = {
        "features": {**asdict(recipe), "num_features": train.shape[1]},
        "probes": [asdict(result) for result in results],
        "lr": chosen.lr,
        "chosen_by": "the held-out images" if len(rates) > 1 else "nobody: one learning rate, last epoch",
        "few_labels": {},
    }
    for num in few:
        draws = labelled(labels[0].numpy(), num, subject.recorded.seed, kind.draws)
        means = {
            lr: float(np.mean([probes.train(train[ids], labels[0][ids], lr).top1 for ids in draws])) for lr in rates
        }
        metrics[f"linear_{num}shot"] = max(means.values())
        details["few_labels"][str(num)] = [{"lr": lr, "top1": mean} for lr, mean in means.items()]
    return Findings(metrics=metrics, details=details)


class _Probes:
    """Trains probes one after the other, and tells how far they are."""

    def __init__(self, subject: Subject, kind: LinearConfig, val: Tensor, val_labels: Tensor, num_probes: int) -> None:
        self.subject, self.val, self.val_labels = subject, val, val_labels
        self.num_classes = subject.data.train.num_classes
        self.rule = ProbeRule(
            epochs=kind.epochs, batch_size=kind.batch_size, momentum=kind.momentum, seed=subject.recorded.seed
        )
        self.done, self.total = 0, num_probes * kind.epochs

    def train(self, features: Tensor, labels: Tensor, lr: float) -> ProbeResult:
        return train_probe(
            features, labels, self.val, self.val_labels,
            num_classes=self.num_classes, lr=lr, rule=self.rule, on_epoch=self._tell,
        )  # fmt: skip

    def _tell(self) -> None:
        self.done += 1
        self.subject.progress("linear probes, epochs", self.done, self.total)


def _attention(subject: Subject, kind: AttentionConfig) -> Findings:
    from dino_exp.analysis.figures.attention import draw_attention

    ids, seen, shown = _chosen(subject, kind.images, kind.image_size)
    maps = torch.cat([class_attention(subject.model, part) for part in torch.split(seen, _AT_ONCE)]).cpu()
    images = [
        {**image, "attention": _rounded(of_heads), "mean": _rounded(of_heads.mean(dim=0))}
        for image, of_heads in zip(_names(subject.data.val, ids), maps, strict=True)
    ]
    details = {"image_size": list(seen.shape[-2:]), "grid": list(maps.shape[-2:]), "images": images}
    return Findings(metrics={}, details=details, picture=draw_attention(shown.numpy(), maps.numpy()))


def _features(subject: Subject, kind: FeaturesConfig) -> Findings:
    from dino_exp.analysis.figures.attention import draw_patch_colours

    ids, seen, shown = _chosen(subject, kind.images, kind.image_size)
    found = patch_colours(torch.cat([patch_tokens(subject.model, part) for part in torch.split(seen, _AT_ONCE)]))
    images = [
        {**image, "colours": _rounded(colours)}
        for image, colours in zip(_names(subject.data.val, ids), found.colours, strict=True)
    ]
    details = {
        "image_size": list(seen.shape[-2:]),
        "grid": list(found.colours.shape[1:3]),
        "explained_variance": _rounded(found.explained),
        "images": images,
    }
    return Findings(metrics={}, details=details, picture=draw_patch_colours(shown.numpy(), found.colours.numpy()))


def _crops(subject: Subject, kind: CropsConfig) -> Findings:
    from dino_exp.analysis.figures.crops import draw_crops

    train = subject.data.train
    ids = choose_images(train, kind.images)
    seen = [view.numpy() for view in subject.crops(ids, kind.epoch)]
    kinds = ["clean", *(f"global {view}" for view in range(1, NUM_GLOBAL + 1))]
    names = kinds + [f"local {view}" for view in range(1, len(seen) - len(kinds) + 1)]
    images = _names(train, ids)
    labels = ["\n".join(f"{what} {number}" for what, number in image.items()) for image in images]
    views = [{"name": name, "size": list(view.shape[1:3])} for name, view in zip(names, seen, strict=True)]
    details = {"augment": subject.recorded.augment.name, "views": views, "images": images}
    return Findings(metrics={}, details=details, picture=draw_crops(labels, list(zip(names, seen, strict=True))))


_KINDS: dict[str, Callable[[Subject, Any], Findings]] = {
    "knn": _knn,
    "linear": _linear,
    "attention": _attention,
    "features": _features,
    "crops": _crops,
}


def _labels(subject: Subject, kind: str) -> tuple[Tensor, Tensor]:
    """The labels of both parts of the data. Raises ConfigError where there is nothing to tell apart, or to measure."""
    data = subject.data
    if len(data.val) == 0:
        raise ConfigError(f"evaluation={kind} measures on held-out images, and {data.val.name} has none")
    if data.train.num_classes < 2:
        has = "no labels" if data.train.num_classes < 1 else "one class only"
        raise ConfigError(
            f"evaluation={kind} tells classes apart, and the data set {data.train.name} has {has}; "
            "evaluation=attention and evaluation=features need no labels"
        )
    train, val = (part.labels(np.arange(len(part))) for part in (data.train, data.val))
    return train, val


def _check_counts(train: Dataset, labels: Tensor, neighbours: tuple[int, ...], few: tuple[int, ...]) -> None:
    """Raises ConfigError for more neighbours, or more labels of a class, than there are images to compare with."""
    largest, num = max(neighbours, default=0), len(labels)
    of_all = "" if num == len(train) else f" chosen by evaluation.train_images={num}"
    if largest > num:
        raise ConfigError(f"evaluation.k={largest}: {train.name} has {num} images{of_all}; choose at most {num}")
    counts = torch.bincount(labels)
    scarcest = int(counts[counts > 0].min())
    if max(few, default=0) > scarcest:
        raise ConfigError(
            f"evaluation.labels_per_class={max(few)}: a class of {train.name} has {scarcest} images{of_all}; "
            f"choose at most {scarcest}"
        )


def _chosen(subject: Subject, wanted: int | tuple[int, ...], image_size: int | None) -> tuple[Indices, Tensor, Tensor]:
    """Numbers of held-out images, the images as the model takes them, and as people do."""
    ids = choose_images(subject.data.val, wanted)
    return ids, *subject.shown(ids, image_size)


def choose_images(dataset: Dataset, wanted: int | tuple[int, ...]) -> Indices:
    """The numbers that were given, or so many images, the first of each class, then the second, and so on.

    Raises ConfigError for none, more than `MOST_IMAGES`, or more or others than there are.
    """
    num = wanted if isinstance(wanted, int) else len(wanted)
    if not 1 <= num <= min(MOST_IMAGES, len(dataset)):
        raise ConfigError(
            f"evaluation.images asks for {num} images of {dataset.name}, which has {len(dataset)}: expected 1 to "
            f"{min(MOST_IMAGES, len(dataset))}"
        )
    if not isinstance(wanted, int):
        if max(wanted) >= len(dataset):
            raise ConfigError(
                f"evaluation.images: {dataset.name} has no image {max(wanted)}; expected 0 to {len(dataset) - 1}"
            )
        return np.array(wanted, np.int64)
    if dataset.num_classes < 2:
        return np.arange(num)
    labels = dataset.labels(np.arange(len(dataset))).numpy()
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.lexsort((labels, turn))[:num].astype(np.int64)


def _names(dataset: Dataset, ids: Indices) -> list[dict[str, int]]:
    """Which images they are: the number of each, and its label where there are some."""
    if dataset.num_classes < 1:
        return [{"index": int(index)} for index in ids]
    labels = dataset.labels(ids).tolist()
    return [{"index": int(index), "label": label} for index, label in zip(ids, labels, strict=True)]


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers, no longer than anybody reads."""
    return np.round(values.detach().cpu().double().numpy(), _DIGITS).tolist()
