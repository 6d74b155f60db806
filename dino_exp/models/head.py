"""DINO's projection head: an MLP to a bottleneck, L2 normalisation, and weight-normalised prototypes.

Shapes: R rows (views x images), D width of the features, K prototypes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_exp.errors import ConfigError
from dino_exp.models.batch_norm import RankedBatchNorm


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
        lengths_K1 = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return functional.linear(rows, self.weight_v * (self.weight_g / lengths_K1))


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
