"""The metrics of record of frozen features, under their fixed names, as shares from 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dino_exp.evaluation.knn import FEW_SHOT_DRAWS, TEMPERATURE, few_shot_accuracy, knn_accuracies

NEIGHBOURS = (20, 5)
LABELS_PER_CLASS = (10, 1)


def evaluate_features(
    train_ND: Tensor,
    train_labels_N: Tensor,
    val_TD: Tensor,
    val_labels_T: Tensor,
    *,
    seed: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    labels_per_class: Sequence[int] = LABELS_PER_CLASS,
    draws: int = FEW_SHOT_DRAWS,
) -> dict[str, float]:
    """k-NN with all labels (`knn_top1`: k = 20, else `knn<k>_top1`) and with few (`knn_10shot`, `knn_1shot`, ...).

    N training images and T held-out ones with D features each. Raises ConfigError when there are too few.
    """
    data = (train_ND, train_labels_N, val_TD, val_labels_T)
    found: dict[str, float] = {}
    if neighbours:
        accuracies = knn_accuracies(*data, neighbours=neighbours, temperature=temperature)
        found = {knn_name(k): accuracy for k, accuracy in zip(neighbours, accuracies, strict=True)}
    for few in labels_per_class:
        found[few_name(few)] = few_shot_accuracy(*data, labels_per_class=few, seed=seed, draws=draws)
    return found


def metric_names(neighbours: Sequence[int], labels_per_class: Sequence[int]) -> tuple[str, ...]:
    """The names of what `evaluate_features` finds, in its order."""
    return (*map(knn_name, neighbours), *map(few_name, labels_per_class))


def knn_name(k: int) -> str:
    """The metric of record of k nearest neighbours; twenty are the standard, so they need no number."""
    return "knn_top1" if k == NEIGHBOURS[0] else f"knn{k}_top1"


def few_name(labels_per_class: int) -> str:
    """The metric of record of the nearest of few labelled images."""
    return f"knn_{labels_per_class}shot"


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The same metrics of something other than the trained model: `init_knn_top1`, `pixel_knn_top1`, ..."""
    return {prefix + name: value for name, value in metrics.items()}
