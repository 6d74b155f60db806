"""Evaluation while training: k-NN on frozen teacher features and the loss on held-out images.

Nothing here changes the state: batch-norm statistics are put back, no gradient is kept, no stateful number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dino_exp.data.datasets import Dataset
from dino_exp.data.images import Images
from dino_exp.dino.loss import dino_loss
from dino_exp.dino.schedules import Schedules
from dino_exp.dist.ranks import Ranks
from dino_exp.evaluation.features import Interrupted, extract_features
from dino_exp.evaluation.report import evaluate_features, prefixed
from dino_exp.models.batch_norm import moments_of_each_rank
from dino_exp.training.parallel import ALONE, Parallel
from dino_exp.training.state import TrainState
from dino_exp.training.step import NUM_GLOBAL, Augment, StepRule

HELD_OUT_OFFSET = 2**31  # sample numbers of held-out images, apart from those of training images

ShouldStop = Callable[[], bool]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures a state on one data set. `clean` makes the deterministic view that features are taken from.

    Several ranks measure together, and all have the same result, which does not depend on how many they are.
    """

    train_set: Dataset
    val_set: Dataset
    augment: Augment
    clean: Callable[[Images], Tensor]
    schedules: Schedules
    rule: StepRule
    seed: int
    batch_size: int
    parallel: Parallel = ALONE

    @property
    def ranks(self) -> Ranks:
        """The processes that measure together."""
        return self.parallel.ranks

    def measure(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        """`knn_*` of the teacher's features and `val_loss`. Raises Interrupted when `should_stop` says so."""
        return self._knn(state, should_stop) | {"val_loss": self._val_loss(state, should_stop)}

    def baselines(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        """The same of the untrained model (`init_*`) and of raw pixels (`pixel_*`)."""
        pixels = [self._pixels(dataset) for dataset in (self.train_set, self.val_set)]
        labels = [_labels(dataset) for dataset in (self.train_set, self.val_set)]
        of_pixels = evaluate_features(pixels[0], labels[0], pixels[1], labels[1], seed=self.seed)
        return prefixed("init_", self._knn(state, should_stop)) | prefixed("pixel_", of_pixels)

    def _knn(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        train, val = (self._features(state, part, should_stop) for part in (self.train_set, self.val_set))
        if not self.ranks.place.is_first:
            return self.ranks.from_first({})
        labels = _labels(self.train_set), _labels(self.val_set)
        return self.ranks.from_first(evaluate_features(train, labels[0], val, labels[1], seed=self.seed))

    def _features(self, state: TrainState, dataset: Dataset, should_stop: ShouldStop) -> Tensor:
        """Of all images, on every rank; each takes some of the batches."""
        device, (chunks, num_own) = state.center_1K.device, self._share(dataset)
        batches = (self.clean(dataset.images(ids).to(device)) for ids in chunks)
        with self.rule.autocast(device) if self.parallel.is_sharded else nullcontext():
            # A sharded model gathers its weights in the precision of the training, and has no other at hand.
            features = extract_features(state.teacher, state.teacher.features, batches, should_stop=should_stop).float()
        num_images = sum(len(ids) for ids in chunks[:num_own])
        return self.ranks.gather(features[:num_images], 0)

    def _pixels(self, dataset: Dataset) -> Tensor:
        return dataset.images(np.arange(len(dataset))).pixels_BCHW.flatten(1).float()

    def _chunks(self, dataset: Dataset) -> list[np.ndarray]:
        ids = np.arange(len(dataset))
        return [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]

    def _share(self, dataset: Dataset) -> tuple[list[np.ndarray], int]:
        """The batches that this rank takes, and how many of them are its own.

        All ranks take equally many, because a sharded model needs all of them for each: some take one again for that.
        """
        chunks, place = self._chunks(dataset), self.ranks.place
        own, most = place.share_of(len(chunks)), -(-len(chunks) // place.size)
        return [chunks[min(own.start + at, len(chunks) - 1)] for at in range(most)], len(own)

    @torch.no_grad()
    def _val_loss(self, state: TrainState, should_stop: ShouldStop) -> float:
        """DINO's loss on held-out images under fixed crops, with the temperature of the last step."""
        temp = self.schedules.teacher_temp_at(max(state.step - 1, 0))
        buffers = [buffer for model in (state.student, state.teacher) for buffer in model.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        chunks, num_own = self._share(self.val_set)
        losses = []
        try:
            with moments_of_each_rank(state.student, state.teacher):
                for ids in chunks:
                    if should_stop():
                        raise Interrupted("evaluation was interrupted")
                    losses.append(len(ids) * self._batch_loss(state, ids, temp))
        finally:
            for buffer, old in zip(buffers, kept, strict=True):
                buffer.copy_(old)
        all_losses = self.ranks.gather(torch.tensor(losses[:num_own], dtype=torch.float64), 0)
        in_order: list[float] = all_losses.tolist()  # added up one by one, however many ranks measured them
        return sum(in_order) / len(self.val_set)

    def _batch_loss(self, state: TrainState, ids: np.ndarray, temp: float) -> float:
        device = state.center_1K.device
        crops = self.augment(self.val_set.images(ids).to(device), torch.from_numpy(ids) + HELD_OUT_OFFSET, 0)
        with self.rule.autocast(device):
            teacher_TBK, _ = state.teacher(crops[:NUM_GLOBAL])
            student_VBK, _ = state.student(crops)
        terms = dino_loss(
            student_VBK, teacher_TBK, state.center_1K, student_temp=self.rule.student_temp, teacher_temp=temp
        )
        return float(terms.loss)


def _labels(dataset: Dataset) -> Tensor:
    return dataset.labels(np.arange(len(dataset)))
