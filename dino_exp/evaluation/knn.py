"""k nearest neighbours on frozen features: cosine similarity, votes weighted by exp(similarity / 0.07).

Source: Wu et al. 2018 (arXiv 1805.01978), as DINO's `eval_knn.py` uses it. The same input gives the same
bits: equally similar neighbours are taken in the order of the training set, and of classes with equal votes
the first wins.

Shapes: N training and T test images, D features, K neighbours, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.errors import ConfigError
from dino_exp.rng import Stream

TEMPERATURE = 0.07
FEW_SHOT_DRAWS = 10
_LARGEST_EXPONENT = 88.0  # a sum of exponentials beyond e to this is infinite in float32
_CHUNK = 256  # test images at once; fixed, so that few of them are as welcome as many
_MOST_AT_ONCE = 1 << 25  # similarities at once, which take 1.3 GB with all that is made of them


def knn_predict(
    train_ND: Tensor, train_labels_N: Tensor, test_TD: Tensor, *, k: int, temperature: float = TEMPERATURE
) -> Tensor:
    """The class that each test image's `k` nearest training images vote for, (T,) int64.

    Raises ConfigError when there are fewer than `k` training images.
    """
    return _predict_each(train_ND, train_labels_N, test_TD, (k,), temperature)[0]


def _predict_each(
    train_ND: Tensor, train_labels_N: Tensor, test_TD: Tensor, neighbours: Sequence[int], temperature: float
) -> list[Tensor]:
    """The predictions of several numbers of neighbours, which are looked for once."""
    for k in neighbours:
        if not 1 <= k <= len(train_ND):
            raise ConfigError(
                f"evaluation: k-NN with k = {k} needs as many training images, and there are {len(train_ND)}; give it "
                "more of them (evaluation.train_images, data.num_samples), or evaluation.every_epochs=null to skip"
            )
    train_ND = functional.normalize(train_ND.float(), dim=1)
    labels_N = train_labels_N.to(train_ND.device)
    num_classes = int(labels_N.max()) + 1
    found: list[list[Tensor]] = [[] for _ in neighbours]
    for chunk in torch.split(functional.normalize(test_TD.float(), dim=1), _chunk(len(train_ND))):
        similarity_TN = chunk @ train_ND.T
        nearest_TK = _nearest(similarity_TN, max(neighbours))
        for k, predicted in zip(neighbours, found, strict=True):
            predicted.append(_vote(similarity_TN, nearest_TK[:, :k], labels_N, num_classes, temperature))
    return [torch.cat(predicted) for predicted in found]


def _chunk(num_train: int) -> int:
    """How many test images at once; fewer, the more training images each is compared with."""
    return max(1, min(_CHUNK, _MOST_AT_ONCE // num_train))


def _vote(similarity_TN: Tensor, nearest_TK: Tensor, labels_N: Tensor, num_classes: int, temperature: float) -> Tensor:
    near_TK = similarity_TN.gather(1, nearest_TK)
    if 1 / temperature + math.log(near_TK.shape[1]) > _LARGEST_EXPONENT:
        # Only the ratios of weights count. At other temperatures nothing is subtracted: it would change bits.
        near_TK = (near_TK - near_TK[:, :1]).double()
    weights_TK = (near_TK / temperature).exp()
    votes_TKL = functional.one_hot(labels_N[nearest_TK], num_classes).to(weights_TK.dtype)
    # A sum over one-hot rows instead of scatter_add, whose order of additions is undefined on a GPU.
    return (weights_TK[..., None] * votes_TKL).sum(dim=1).argmax(dim=1)


def _nearest(similarity_TN: Tensor, k: int) -> Tensor:
    """Positions of the `k` most similar, the earlier of two equals first: topk alone leaves that open.

    The bits of a float, read as a whole number, are in its order (reversed below zero); with the position in
    the low half no two keys are equal.
    """
    bits = (similarity_TN + 0.0).view(torch.int32).long()  # adding zero turns -0.0 into 0.0
    order = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    position = torch.arange(similarity_TN.shape[1], device=similarity_TN.device)
    return (order * 2**32 + (0xFFFFFFFF - position)).topk(k, dim=1).indices


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_TD: Tensor,
    test_labels_T: Tensor,
    *,
    k: int,
    temperature: float = TEMPERATURE,
) -> float:
    """Share of test images whose class `knn_predict` finds, 0 to 1."""
    return knn_accuracies(train_ND, train_labels_N, test_TD, test_labels_T, neighbours=(k,), temperature=temperature)[0]


def knn_accuracies(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_TD: Tensor,
    test_labels_T: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float = TEMPERATURE,
) -> list[float]:
    """`knn_accuracy` of several numbers of neighbours, one at least, in hardly more time than that of the largest."""
    predicted = _predict_each(train_ND, train_labels_N, test_TD, neighbours, temperature)
    return [float((one == test_labels_T.to(one.device)).double().mean()) for one in predicted]


def few_shot_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_TD: Tensor,
    test_labels_T: Tensor,
    *,
    labels_per_class: int,
    seed: int,
    draws: int = FEW_SHOT_DRAWS,
) -> float:
    """Accuracy (0 to 1) of the nearest labelled image when a class has only `labels_per_class` labels.

    The mean over `draws` random choices of the labelled images, which depend on the seed alone. Raises
    ConfigError when a class has fewer images.
    """
    labels_N = train_labels_N.cpu().numpy()
    total = 0.0
    for chosen in torch.from_numpy(labelled(labels_N, labels_per_class, seed, draws)).to(train_ND.device):
        few, few_labels = train_ND[chosen], train_labels_N.to(train_ND.device)[chosen]
        total += knn_accuracy(few, few_labels, test_TD, test_labels_T, k=1)
    return total / draws


def labelled(labels_N: np.ndarray, labels_per_class: int, seed: int, draws: int) -> np.ndarray:
    """Positions of `labels_per_class` random images of each class that occurs: a row for each of `draws` choices.

    Raises ConfigError when a class has fewer images.
    """
    stream = Stream(seed, "evaluation.few_shot")
    chosen = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        if len(members) < labels_per_class:
            raise ConfigError(
                f"evaluation: class {label} has {len(members)} training images, and {labels_per_class} are "
                "needed; give it more of them (evaluation.train_images, data.num_samples), or "
                "evaluation.every_epochs=null to skip"
            )
        orders = stream.permutation(np.arange(draws), int(label), num=len(members))
        chosen.append(members[orders[:, :labels_per_class]])
    return np.concatenate(chosen, axis=1)
