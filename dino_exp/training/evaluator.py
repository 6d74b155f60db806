"""Evaluation while training: k-NN on frozen teacher features and the loss on held-out images.

Nothing here changes the state: batch-norm statistics are put back, no gradient is kept, no stateful number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_exp.data.datasets import Dataset, Indices
from dino_exp.data.images import Images
from dino_exp.dino.loss import dino_loss
from dino_exp.dino.schedules import Schedules
from dino_exp.dist.ranks import Ranks
from dino_exp.evaluation.features import Interrupted, extract_features
from dino_exp.evaluation.panel import VAL_LOSS, Panel
from dino_exp.evaluation.pixels import MOST_IMAGES, SIDE, raw_pixels, reduced_pixels
from dino_exp.evaluation.report import evaluate_features, prefixed
from dino_exp.models.batch_norm import moments_of_each_rank
from dino_exp.training.parallel import ALONE, Parallel
from dino_exp.training.state import TrainState
from dino_exp.training.step import NUM_GLOBAL, Augment, StepRule

HELD_OUT_OFFSET = 2**31  # sample numbers of held-out images, apart from those of training images

ShouldStop = Callable[[], bool]
MakeRows = Callable[[Images], Tensor]


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Measures a state on the images of a panel. `clean` makes the deterministic view that features are taken from.

    Several ranks measure together, and all have the same result, which does not depend on how many they are.
    `compiled`: whether the layers are. They are measured as they are written: a process that begins in the middle of a
    run must compile what the steps need, in the same order as one that has measured before.
    """

    panel: Panel
    augment: Augment
    clean: Callable[[Images], Tensor]
    schedules: Schedules
    rule: StepRule
    seed: int
    batch_size: int
    parallel: Parallel = ALONE
    compiled: bool = False

    @property
    def ranks(self) -> Ranks:
        """The processes that measure together."""
        return self.parallel.ranks

    def measure(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        """`panel.metrics` of the state. Raises Interrupted when `should_stop` says so."""
        with self._as_written():
            return self._knn(state, should_stop) | {VAL_LOSS: self._val_loss(state, should_stop)}

    def baselines(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        """k-NN of the untrained model (`init_*`) and of pixels (`pixel_*`); nothing where there are no classes."""
        of_pixels = self._knn_of_pixels(state, should_stop)
        with self._as_written():
            return prefixed("init_", self._knn(state, should_stop)) | prefixed("pixel_", of_pixels)

    def _as_written(self) -> AbstractContextManager[object]:
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _knn(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        if not self.panel.has_classes:
            return {}
        train = self._features(state, self.panel.train_set, self.panel.bank, should_stop)
        val = self._features(state, self.panel.val_set, self.panel.held_out, should_stop)
        return self._accuracies(self.panel, train, val)

    def _accuracies(self, panel: Panel, train_ND: Tensor, val_TD: Tensor) -> dict[str, float]:
        """k-NN on features of a panel's images, measured by the first rank for all."""
        if not self.ranks.place.is_first:
            return self.ranks.from_first({})
        labels = panel.train_set.labels(panel.bank), panel.val_set.labels(panel.held_out)
        found = evaluate_features(train_ND, labels[0], val_TD, labels[1], seed=self.seed, labels_per_class=panel.few)
        return self.ranks.from_first(found)

    def _features(self, state: TrainState, dataset: Dataset, ids: Indices, should_stop: ShouldStop) -> Tensor:
        """Of the images at `ids`, on every rank; each takes some of the batches."""
        device, (chunks, num_own) = state.center_1K.device, self._share(ids)
        batches = (self.clean(dataset.images(chunk).to(device)) for chunk in chunks)
        with self.rule.autocast(device) if self.parallel.is_sharded else nullcontext():
            # A sharded model gathers its weights in the precision of the training, and has no other at hand.
            features = extract_features(state.teacher, state.teacher.features, batches, should_stop=should_stop).float()
        return self._gathered(features, chunks[:num_own])

    def _knn_of_pixels(self, state: TrainState, should_stop: ShouldStop) -> dict[str, float]:
        if not self.panel.has_classes:
            return {}
        panel, device = self.panel.at_most(MOST_IMAGES), state.center_1K.device
        train, val = self._raw(panel, should_stop) or self._reduced(panel, device, should_stop)
        return self._accuracies(panel, train, val)

    def _raw(self, panel: Panel, should_stop: ShouldStop) -> tuple[Tensor, Tensor] | None:
        """All pixels of training and held-out images; None where some are large, or not as large as the others."""
        size, fill = panel.train_set.size, True
        if size != panel.val_set.size or max(size) > SIDE:
            return None

        def make(images: Images) -> Tensor:
            nonlocal fill
            fill &= images.fill_canvas
            return raw_pixels(images)

        rows = self._both(panel, make, should_stop)
        num_ranks_with_others = self.ranks.add_(torch.tensor(float(not fill))).item()
        return None if num_ranks_with_others else rows

    def _reduced(self, panel: Panel, device: torch.device, should_stop: ShouldStop) -> tuple[Tensor, Tensor]:
        """Small clean views of training and held-out images."""
        return self._both(panel, lambda images: reduced_pixels(self.clean(images.to(device))), should_stop)

    def _both(self, panel: Panel, make: MakeRows, should_stop: ShouldStop) -> tuple[Tensor, Tensor]:
        train = self._rows(panel.train_set, panel.bank, make, should_stop)
        return train, self._rows(panel.val_set, panel.held_out, make, should_stop)

    def _rows(self, dataset: Dataset, ids: Indices, make: MakeRows, should_stop: ShouldStop) -> Tensor:
        """What `make` makes of the images at `ids`, a row each, on every rank; each takes some of the batches."""
        chunks, num_own = self._share(ids)
        rows = []
        for chunk in chunks:
            if should_stop():
                raise Interrupted("evaluation was interrupted")
            rows.append(make(dataset.images(chunk)))
        return self._gathered(torch.cat(rows), chunks[:num_own])

    def _gathered(self, rows: Tensor, own: Sequence[Indices]) -> Tensor:
        """The rows of all ranks, of which the first here are those of the batches in `own`."""
        return self.ranks.gather(rows[: sum(map(len, own))], 0)

    def _share(self, ids: Indices) -> tuple[list[Indices], int]:
        """The batches of `ids` that this rank takes, and how many of them are its own.

        All ranks take equally many, because a sharded model needs all of them for each: some take one again for that.
        """
        chunks = [ids[start : start + self.batch_size] for start in range(0, len(ids), self.batch_size)]
        place = self.ranks.place
        own, most = place.share_of(len(chunks)), -(-len(chunks) // place.size)
        return [chunks[min(own.start + at, len(chunks) - 1)] for at in range(most)], len(own)

    @torch.no_grad()
    def _val_loss(self, state: TrainState, should_stop: ShouldStop) -> float:
        """DINO's loss on held-out images under fixed crops, with the temperature of the last step."""
        temp = self.schedules.teacher_temp_at(max(state.step - 1, 0))
        buffers = [buffer for model in (state.student, state.teacher) for buffer in model.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        chunks, num_own = self._share(self.panel.held_out)
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
        return sum(in_order) / len(self.panel.held_out)

    def _batch_loss(self, state: TrainState, ids: Indices, temp: float) -> float:
        device = state.center_1K.device
        crops = self.augment(self.panel.val_set.images(ids).to(device), torch.from_numpy(ids) + HELD_OUT_OFFSET, 0)
        with self.rule.autocast(device):
            teacher_TBK, _ = state.teacher(crops[:NUM_GLOBAL])
            student_VBK, _ = state.student(crops)
        terms = dino_loss(
            student_VBK, teacher_TBK, state.center_1K, student_temp=self.rule.student_temp, teacher_temp=temp
        )
        return float(terms.loss)
