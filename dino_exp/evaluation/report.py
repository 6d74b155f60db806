"""The metrics of record of frozen features, under their fixed names, as shares from 0 to 1."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dino_exp.evaluation.knn import few_shot_accuracy, knn_accuracy


def evaluate_features(
    train_ND: Tensor, train_labels_N: Tensor, val_TD: Tensor, val_labels_T: Tensor, *, seed: int
) -> dict[str, float]:
    """k-NN with all labels (`knn_top1`: k = 20, `knn5_top1`) and with few (`knn_10shot`, `knn_1shot`).

    N training images and T held-out ones with D features each. Raises ConfigError when there are too few.
    """
    data = (train_ND, train_labels_N, val_TD, val_labels_T)
    return {
        "knn_top1": knn_accuracy(*data, k=20),
        "knn5_top1": knn_accuracy(*data, k=5),
        "knn_10shot": few_shot_accuracy(*data, labels_per_class=10, seed=seed),
        "knn_1shot": few_shot_accuracy(*data, labels_per_class=1, seed=seed),
    }


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The same metrics of something other than the trained model: `init_knn_top1`, `pixel_knn_top1`, ..."""
    return {prefix + name: value for name, value in metrics.items()}
