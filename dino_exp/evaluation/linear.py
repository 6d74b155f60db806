"""A linear classifier on frozen features, trained as official DINO does (`eval_linear.py`).

Features: for small models the class tokens of the last four blocks, side by side; for larger ones the last class token
beside the mean of the patches; each after the final norm. Training: weights from N(0, 0.01), biases 0, cross-entropy,
SGD with momentum 0.9 and no weight decay, cosine from the learning rate to 0, one step down an epoch.

Shapes: N training and T test images, B images of a batch, F features, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dino_exp.errors import ConfigError
from dino_exp.models.vit import VisionTransformer
from dino_exp.rng import Stream

SMALL_BLOCKS = 4  # whose class tokens describe an image, of models up to the width of ViT-S
SMALL_DIM = 384
BATCH_OF_RATE = 256  # a learning rate is meant for batches of so many images, and scaled to others
_INIT_STD = 0.01


@dataclass(frozen=True, kw_only=True)
class FeatureRecipe:
    """Which tokens describe an image: the class tokens of the last `num_blocks` blocks, and perhaps the mean patch."""

    num_blocks: int
    mean_patch: bool

    def features(self, model: VisionTransformer, images_BCHW: Tensor) -> Tensor:
        """(B, F) of normalised images, F being the model's width times the number of parts."""
        tokens = model.last_tokens(images_BCHW, self.num_blocks)
        parts = [tokens_BND[:, 0] for tokens_BND in tokens]
        if self.mean_patch:
            parts.append(tokens[-1][:, 1:].mean(dim=1))
        return torch.cat(parts, dim=-1)


def feature_recipe(
    model: VisionTransformer, num_blocks: int | None = None, mean_patch: bool | None = None
) -> FeatureRecipe:
    """What the official recipe takes of this model, or what is asked for instead.

    Up to the width of ViT-S the last four blocks (all of a model with fewer), beyond it the last one with the mean
    patch. Raises ConfigError for more blocks than the model has.
    """
    is_small, depth = model.embed_dim <= SMALL_DIM, len(model.blocks)
    if num_blocks is not None and num_blocks > depth:
        raise ConfigError(f"evaluation.num_blocks={num_blocks}: the model has {depth} blocks; expected 1 to {depth}")
    return FeatureRecipe(
        num_blocks=(min(SMALL_BLOCKS, depth) if is_small else 1) if num_blocks is None else num_blocks,
        mean_patch=not is_small if mean_patch is None else mean_patch,
    )


@dataclass(frozen=True, kw_only=True)
class ProbeRule:
    """How a probe is trained. A learning rate is for batches of 256 images, and scaled to `batch_size`."""

    epochs: int
    batch_size: int
    momentum: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One trained probe; accuracies (0 to 1) are of the test images. `best_epoch` counts from 1.

    `top1` is that of the last epoch. `best_top1` was chosen by looking at the test images, as official DINO reports it.
    """

    lr: float
    top1: float
    best_top1: float
    best_epoch: int
    train_loss: float


@torch.no_grad()
def train_probe(
    train_NF: Tensor,
    train_labels_N: Tensor,
    test_TF: Tensor,
    test_labels_T: Tensor,
    *,
    num_classes: int,
    lr: float,
    rule: ProbeRule,
    on_epoch: Callable[[], None] = lambda: None,
) -> ProbeResult:
    """Train one linear classifier on features and measure it after every epoch.

    The order of the images and the first weights are pure functions of the seed: equal arguments give equal bits. The
    last batch of an epoch may be smaller than the others.
    """
    device = train_NF.device
    labels_N, answers_T = train_labels_N.to(device), test_labels_T.to(device)
    weight_LF, bias_L = _first_weights(num_classes, train_NF.shape[1], rule.seed, device)
    momenta = torch.zeros_like(weight_LF), torch.zeros_like(bias_L)
    peak, loss, accuracies = lr * rule.batch_size / BATCH_OF_RATE, torch.zeros(()), list[float]()
    order = Stream(rule.seed, "evaluation.linear.order")
    for epoch in range(rule.epochs):
        rate = peak * cosine(epoch, rule.epochs)
        shuffled = torch.from_numpy(order.permutation(epoch, num=len(train_NF))).to(device)
        for chosen_B in torch.split(shuffled, rule.batch_size):
            rows_BF, wanted_B = train_NF[chosen_B], labels_N[chosen_B]
            log_BL = functional.linear(rows_BF, weight_LF, bias_L).log_softmax(dim=1)
            loss = functional.nll_loss(log_BL, wanted_B)
            # The gradient of the mean cross-entropy, written out: a hundred epochs are thousands of tiny steps.
            error_BL = (log_BL.exp() - functional.one_hot(wanted_B, num_classes)) / len(rows_BF)
            gradients = error_BL.T @ rows_BF, error_BL.sum(dim=0)
            for value, moved, gradient in zip((weight_LF, bias_L), momenta, gradients, strict=True):
                moved.mul_(rule.momentum).add_(gradient)
                value.sub_(moved, alpha=rate)
        found_T = functional.linear(test_TF, weight_LF, bias_L).argmax(dim=1)
        accuracies.append(float((found_T == answers_T).double().mean()))
        on_epoch()
    best = max(accuracies)
    return ProbeResult(
        lr=lr, top1=accuracies[-1], best_top1=best, best_epoch=accuracies.index(best) + 1, train_loss=float(loss)
    )


def cosine(epoch: int, num_epochs: int) -> float:
    """The share of the peak learning rate in `epoch` (from 0): 1 at first, towards 0 after the last."""
    return (1 + math.cos(math.pi * epoch / num_epochs)) / 2


def _first_weights(num_classes: int, num_features: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    drawn = Stream(seed, "evaluation.linear.init").normal(torch.arange(num_classes).numpy(), num=num_features)
    weight_LF = torch.from_numpy(_INIT_STD * drawn).float().to(device)
    return weight_LF, torch.zeros(num_classes, device=device)
