"""DINO's projection head: an MLP to a bottleneck, L2 normalisation, and weight-normalised prototypes.

Shapes: R rows (views x images), D width of the features, K prototypes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dino_exp.errors import ConfigError
from dino_exp.models.batch_norm import RankedBatchNorm

_VECTORS_AT_ONCE = 4096


class DINOHead(nn.Module):
    """Features (..., D) to logits over K prototypes (..., K). Caron et al. 2021, appendix C.

    `norm_last_layer` keeps the length of every prototype at 1. Built without meaningful values:
    `dino_exp.models.init` gives every parameter one.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_layers: int = 3,
        use_bn: bool,
        norm_last_layer: bool,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"loss.num_layers must be >= 1, got {num_layers}")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        self.mlp = _mlp(widths, use_bn=use_bn)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, train_norms=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., K). With batch norm in training mode this also updates its running statistics."""
        rows_RD = features.flatten(0, -2)
        bottleneck = functional.normalize(self.mlp(rows_RD), dim=-1).reshape((*features.shape[:-1], -1))
        return self.last_layer(bottleneck)  # type: ignore[no-any-return]


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose row k is `weight_g[k] * weight_v[k] / ||weight_v[k]||`.

    Torch's own weight norms do not serve: the old one breaks `copy.deepcopy`, the new one renames the
    parameters.
    """

    def __init__(self, in_dim: int, out_dim: int, *, train_norms: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norms)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))

    def forward(self, rows: Tensor) -> Tensor:
        """Apply to the last axis of `rows`."""
        device = self.weight_v.device.type
        if torch.is_autocast_enabled(device):  # as autocast treats a linear layer
            rows = rows.to(torch.get_autocast_dtype(device))
        logits: Tensor = _UnitLinear.apply(rows, self.weight_v, self.weight_g)  # type: ignore[no-untyped-call]
        return logits


class _UnitLinear(torch.autograd.Function):
    """Rows times unit vectors times lengths, multiplied in the precision of the rows.

    The products are scaled, not the vectors, which are many more than rows. The gradient of the normalisation is what
    remains of the product's gradient beside each vector; it is taken some vectors at a time, in the cache.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_v_KD: Tensor, weight_g_K1: Tensor) -> Tensor:
        lengths_K = torch.linalg.vector_norm(weight_v_KD, dim=1)
        products = functional.linear(rows, weight_v_KD.to(rows.dtype))
        scales_K = (weight_g_K1[:, 0] / lengths_K).to(products.dtype)
        # Lengths that are trained may be 0, and no logit tells of the product then.
        trains_lengths = ctx.needs_input_grad[2]
        logits: Tensor = products * scales_K if trains_lengths else products.mul_(scales_K)
        ctx.save_for_backward(rows, weight_v_KD, weight_g_K1, lengths_K, products if trains_lengths else None)
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight_v_KD, weight_g_K1, lengths_K, products = ctx.saved_tensors
        scales_K = weight_g_K1[:, 0] / lengths_K
        of_products_RK = (gradient * scales_K.to(gradient.dtype)).flatten(0, -2)
        of_rows = of_v_KD = of_g_K1 = None
        if ctx.needs_input_grad[0]:
            of_rows = (of_products_RK @ weight_v_KD.to(rows.dtype)).view_as(rows)
        if ctx.needs_input_grad[2]:
            of_lengths_K = (gradient * products).flatten(0, -2).sum(dim=0, dtype=lengths_K.dtype)
            of_g_K1 = (of_lengths_K / lengths_K)[:, None]
        if ctx.needs_input_grad[1]:
            of_v_KD = torch.empty_like(weight_v_KD)
            for start in range(0, len(of_v_KD), _VECTORS_AT_ONCE):
                some = slice(start, start + _VECTORS_AT_ONCE)
                whole = (of_products_RK[:, some].T @ rows.flatten(0, -2)).to(of_v_KD.dtype)
                along = torch.linalg.vecdot(whole, weight_v_KD[some]) / lengths_K[some].square()
                torch.addcmul(whole, weight_v_KD[some], along[:, None], value=-1, out=of_v_KD[some])
        return of_rows, of_v_KD, of_g_K1


def _mlp(widths: list[int], *, use_bn: bool) -> nn.Module:
    """Linear layers with GELU (and batch norm) between them, numbered as in the official head."""
    *hidden, last = itertools.pairwise(widths)
    if not hidden:
        return nn.Linear(*last)
    layers: list[nn.Module] = []
    for width_in, width_out in hidden:
        layers.append(nn.Linear(width_in, width_out))
        if use_bn:
            layers.append(RankedBatchNorm(width_out))
        layers.append(nn.GELU())
    return nn.Sequential(*layers, nn.Linear(*last))
