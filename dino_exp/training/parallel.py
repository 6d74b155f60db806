"""How student and teacher lie over the ranks: whole on each (data parallel), or cut into shares (see `sharded`).

Whatever it is, gradients are sums over the global batch, and what the rest of the step sees of a parameter is this
rank's part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.dist.ranks import ONE_RANK, Ranks
from dino_exp.models.batch_norm import RankedBatchNorm

_BUCKET_BYTES = 25 << 20  # as torch's own data parallel wrapper has it


class Parallel(Protocol):
    """What a step needs to know of it."""

    @property
    def ranks(self) -> Ranks:
        """The processes that carry out the training."""

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds but a part of each parameter."""

    def backward(self, *, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Around the backward pass of a part of the batch: after the last part, gradients are those of all ranks."""

    def whole_norms(self, norms_P: Tensor) -> Tensor:
        """The norms of whole tensors from those of this rank's parts."""


class Alone:
    """Everything in one process."""

    ranks: Ranks = ONE_RANK
    is_sharded = False

    def backward(self, *, is_last: bool) -> contextlib.AbstractContextManager[object]:
        """Nothing to add."""
        return contextlib.nullcontext()

    def whole_norms(self, norms_P: Tensor) -> Tensor:
        """The norms themselves."""
        return norms_P


ALONE = Alone()


class Replicated:
    """Every rank holds everything; gradients are added while the backward pass goes on.

    Not torch's DistributedDataParallel: it lays out its buckets anew after the first step of a process, and with three
    or more ranks another layout adds in another order, so that a resumed run would end in other bits.
    """

    is_sharded = False

    def __init__(self, student: MultiCropModel, teacher: MultiCropModel, ranks: Ranks) -> None:
        self.ranks = ranks
        self._sum = GradientSum([parameter for parameter in student.parameters() if parameter.requires_grad])
        share_moments(student, teacher, ranks)

    @contextlib.contextmanager
    def backward(self, *, is_last: bool) -> Iterator[None]:
        """Add the gradients of all ranks, with those of the parts before, in the last part."""
        if not is_last:
            yield
            return
        with self._sum.over_all():
            yield

    def whole_norms(self, norms_P: Tensor) -> Tensor:
        """The norms themselves."""
        return norms_P


class GradientSum:
    """Adds the gradients of all ranks, bucket by bucket, in one layout that depends on the parameters alone."""

    def __init__(self, parameters: Iterable[nn.Parameter], bucket_bytes: int = _BUCKET_BYTES) -> None:
        # From the last to the first: about the order in which the backward pass comes to them.
        self._buckets = [_Bucket(group) for group in _grouped(reversed(list(parameters)), bucket_bytes)]
        self._num_begun, self._is_open = 0, False
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def over_all(self) -> Iterator[None]:
        """The backward pass inside ends with the sums in place of the gradients."""
        self._num_begun, self._is_open = 0, True
        for bucket in self._buckets:
            bucket.num_missing = len(bucket.parameters)
        try:
            yield
            assert self._num_begun == len(self._buckets), "a trained parameter got no gradient"
            for bucket in self._buckets:
                bucket.end()
        finally:
            self._is_open = False

    def _hook(self, bucket: _Bucket) -> Callable[[nn.Parameter], None]:
        def note(_: nn.Parameter) -> None:
            if self._is_open:
                bucket.num_missing -= 1
                self._begin_what_is_ready()

        return note

    def _begin_what_is_ready(self) -> None:
        """In the order of the buckets, which is the same on all ranks, whichever is ready first."""
        while self._num_begun < len(self._buckets) and self._buckets[self._num_begun].num_missing == 0:
            self._buckets[self._num_begun].begin()
            self._num_begun += 1


class _Bucket:
    """Gradients that travel together."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.num_missing = 0
        self._flat: Tensor | None = None
        self._work: torch.distributed.Work | None = None

    def begin(self) -> None:
        self._flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in self.parameters])
        self._work = torch.distributed.all_reduce(self._flat, async_op=True)

    def end(self) -> None:
        assert self._work is not None
        assert self._flat is not None
        self._work.wait()  # on a CUDA device the stream waits, not the host
        parts = torch.split(self._flat, [parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._flat = self._work = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _grouped(parameters: Iterable[nn.Parameter], most_bytes: int) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters of one type, together of about so many bytes."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        full = sum(one.numel() * one.element_size() for one in group) >= most_bytes
        if group and (full or group[0].dtype != parameter.dtype):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


def share_moments(student: MultiCropModel, teacher: MultiCropModel, ranks: Ranks) -> None:
    """Let batch norm see the rows of all ranks."""
    for model in (student, teacher):
        for layer in model.modules():
            if isinstance(layer, RankedBatchNorm):
                layer.ranks = ranks


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be cut into shares: the same memory, without a gradient."""
    to_local = getattr(tensor, "to_local", None)
    with torch.no_grad():
        return tensor.detach() if to_local is None else to_local().detach()
