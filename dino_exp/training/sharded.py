"""Student and teacher cut into shares by FSDP2, block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.dino.scaling import HALF
from dino_exp.dist.ranks import Ranks
from dino_exp.models.batch_norm import RankedBatchNorm
from dino_exp.models.head import WeightNormLinear
from dino_exp.training.parallel import share_moments


class Sharded:
    """Every rank holds a part of each parameter and moment; FSDP2 gathers a block's when it is its turn.

    Both models are changed in place; the optimizer is made afterwards, of what parameters are then.
    """

    is_sharded = True

    def __init__(self, student: MultiCropModel, teacher: MultiCropModel, ranks: Ranks, *, precision: str) -> None:
        self.ranks = ranks
        self._student = student
        device = next(student.parameters()).device.type
        mesh = init_device_mesh(device, (ranks.place.size,))
        for model in (student, teacher):
            _shard(model, mesh, precision)
        share_moments(student, teacher, ranks)

    @contextlib.contextmanager
    def backward(self, *, is_last: bool) -> Iterator[None]:
        """Add gradients and divide them into shares after the last part of a batch; before, each rank keeps its own."""
        root: Any = self._student
        root.set_requires_gradient_sync(is_last)
        yield

    def whole_norms(self, norms_P: Tensor) -> Tensor:
        """The norms of whole tensors from those of the shares of all ranks."""
        return self.ranks.add_(norms_P.square()).sqrt()


def _shard(model: MultiCropModel, mesh: DeviceMesh, precision: str) -> None:
    """Per block, the head by itself, and the rest; the parts of one unit travel together."""
    half = MixedPrecisionPolicy()
    if precision in HALF:  # half the traffic; autocast would make the same of these weights
        half = MixedPrecisionPolicy(param_dtype=HALF[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    head: Any = model.head
    backbone: Any = model.backbone
    # What needs every digit: batch norm, the norms of the prototypes, the position table.
    precise: list[Any] = [layer for layer in head.modules() if isinstance(layer, (RankedBatchNorm, WeightNormLinear))]
    unit: Any
    for unit in precise:
        fully_shard(unit, mesh=mesh)
    for unit in (*backbone.blocks, head):
        fully_shard(unit, mesh=mesh, mp_policy=half)
    for unit in (backbone, model):
        fully_shard(unit, mesh=mesh)
    register_fsdp_forward_method(model, "features")
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)  # the loss is a share of the whole batch's: a sum, and no mean,
            unit.set_force_sum_reduction_for_comms(True)  # for which gloo knows no scaled operation
