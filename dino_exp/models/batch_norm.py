"""Batch norm over a batch that lies on several ranks, with the moments of all of it.

torch's SyncBatchNorm does the same on CUDA devices and refuses CPU tensors.

Shapes: R rows of this rank, H features, N ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dino_exp.dist.ranks import Ranks


class RankedBatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` for rows (R, H), and just that for one process and in evaluation.

    With `ranks` the moments are those of the rows of all ranks, whose numbers may differ, and every rank's running
    statistics move by the same bits. All ranks must come here equally often.
    """

    ranks: Ranks | None = None

    def forward(self, rows_RH: Tensor) -> Tensor:
        """Normalised rows (R, H)."""
        if self.ranks is None or not self.training:
            return super().forward(rows_RH)
        assert self.momentum is not None
        precise_RH = rows_RH.float() if rows_RH.dtype in (torch.float16, torch.bfloat16) else rows_RH
        mean_H, var_H, num_rows = _moments_of_all(precise_RH.detach(), self.ranks)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean_H.to(self.running_mean.dtype), self.momentum)
            unbiased_H = var_H * (num_rows / (num_rows - 1))
            self.running_var.lerp_(unbiased_H.to(self.running_var.dtype), self.momentum)
        rstd_H = (var_H + self.eps).rsqrt()
        normal_RH: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            precise_RH, mean_H, rstd_H, num_rows, self.ranks
        )
        return (normal_RH * self.weight + self.bias).to(rows_RH.dtype)


def _moments_of_all(rows_RH: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of the rows of all ranks, and how many these are (Chan et al. 1983, eq. 2.1)."""
    mean_H = rows_RH.mean(dim=0)
    squares_H = (rows_RH - mean_H).square().sum(dim=0)
    own = torch.cat([mean_H, squares_H, mean_H.new_full((1,), float(len(rows_RH)))])
    num_features = rows_RH.shape[1]
    all_N = ranks.stack(own)
    means_NH, squares_NH, counts_N1 = torch.split(all_N, [num_features, num_features, 1], dim=1)
    num_rows = counts_N1.sum()  # stays on the device: nobody waits for it
    mean_H = (means_NH * counts_N1).sum(dim=0) / num_rows
    between_NH = counts_N1 * (means_NH - mean_H).square()
    return mean_H, (squares_NH + between_NH).sum(dim=0) / num_rows, num_rows


class _Normalise(torch.autograd.Function):
    """(rows - mean) * rstd, where mean and rstd depend on the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, mean_H: Tensor, rstd_H: Tensor, num_rows: Tensor, ranks: Ranks) -> Tensor:
        normal_RH = (rows_RH - mean_H) * rstd_H
        ctx.save_for_backward(normal_RH, rstd_H, num_rows)
        ctx.ranks = ranks
        return normal_RH

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        normal_RH, rstd_H, num_rows = ctx.saved_tensors
        (gradient_RH,) = gradients
        sums_2H = torch.stack([gradient_RH.sum(dim=0), (gradient_RH * normal_RH).sum(dim=0)])
        mean_H, slope_H = ctx.ranks.add_(sums_2H) / num_rows
        return (gradient_RH - mean_H - normal_RH * slope_H) * rstd_H, None, None, None, None


@contextlib.contextmanager
def moments_of_each_rank(*models: nn.Module) -> Iterator[None]:
    """Inside, every rank normalises by the moments of its own rows: for batches that are not shared."""
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, RankedBatchNorm)]
    kept = [layer.ranks for layer in layers]
    try:
        for layer in layers:
            layer.ranks = None
        yield
    finally:
        for layer, ranks in zip(layers, kept, strict=True):
            layer.ranks = ranks
