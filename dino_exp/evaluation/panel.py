"""The images that evaluations during training look at, and what they allow to be measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from dino_exp.data.datasets import Dataset, Indices
from dino_exp.errors import ConfigError
from dino_exp.evaluation.report import LABELS_PER_CLASS, NEIGHBOURS, few_name, metric_names

VAL_LOSS = "val_loss"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Images of a data set: all of them, or `train_images` and `val_images` of its two parts, evenly spread.

    Without classes to tell apart there is no k-NN. Raises ConfigError for data on which nothing can be measured.
    """

    train_set: Dataset
    val_set: Dataset
    train_images: int | None = None
    val_images: int | None = None

    def __post_init__(self) -> None:
        if len(self.val_set) == 0:
            raise ConfigError(
                f"evaluation: {self.val_set.name} has no images, and every measure is taken on held-out ones. Give the "
                "data set some, or evaluation.every_epochs=null to train without evaluation"
            )
        if self.has_classes and len(self.bank) < max(NEIGHBOURS):
            raise ConfigError(
                f"evaluation: k-NN takes the {max(NEIGHBOURS)} nearest training images, and compares with "
                f"{len(self.bank)} of {self.train_set.name}. Give it more (evaluation.train_images=null: all of them), "
                "or evaluation.every_epochs=null to train without evaluation"
            )

    @property
    def has_classes(self) -> bool:
        """Whether there is something to tell apart."""
        return self.train_set.num_classes > 1

    @cached_property
    def bank(self) -> Indices:
        """Numbers of the training images that k-NN compares with, and whose labels it knows."""
        return evenly(len(self.train_set), self.train_images)

    @cached_property
    def held_out(self) -> Indices:
        """Numbers of the held-out images that are measured."""
        return evenly(len(self.val_set), self.val_images)

    @cached_property
    def few(self) -> tuple[int, ...]:
        """The numbers of labels a class that k-NN is measured with: those that every class of the bank has."""
        if not self.has_classes:
            return ()
        counts = torch.bincount(self.train_set.labels(self.bank))
        scarcest = int(counts[counts > 0].min())
        return tuple(num for num in LABELS_PER_CLASS if num <= scarcest)

    def at_most(self, num_images: int) -> Panel:
        """The same with no more than so many images of either part."""
        bank, held_out = (min(len(ids), num_images) for ids in (self.bank, self.held_out))
        return replace(self, train_images=bank, val_images=held_out)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of record of everything that is measured."""
        return (*metric_names(NEIGHBOURS, self.few), VAL_LOSS) if self.has_classes else (VAL_LOSS,)

    def remarks(self) -> list[str]:
        """What the data does not allow to be measured, in sentences."""
        name = self.train_set.name
        if not self.has_classes:
            has = "no labels" if self.train_set.num_classes < 1 else "one class only"
            return [f"{name} has {has}: there is no k-NN, and evaluations measure {VAL_LOSS} alone"]
        return [
            f"{few_name(num)} is not measured: a class has fewer than {num} of the {len(self.bank)} training images of "
            f"{name} that k-NN compares with"
            for num in LABELS_PER_CLASS
            if num not in self.few
        ]


def evenly(num_images: int, wanted: int | None) -> Indices:
    """Numbers of `wanted` of so many images, spread evenly over them: always the same ones; all for None, or too many.

    Of a data set that is sorted by class, each class has its share in it, give or take one image.
    """
    if wanted is None or wanted >= num_images:
        return np.arange(num_images)
    return np.arange(wanted) * num_images // wanted
