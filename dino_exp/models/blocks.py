"""The layers of a vision transformer, on tokens of images of several sizes in one row.

Shapes: T tokens of all images, B images of one size with N tokens each, Q of them asked for, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_exp.models.packing import Packing, packed

NORM_EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """In the precision of its input, also where FSDP hands it weights of another."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise the last axis."""
        weight, bias = self.weight.to(tokens.dtype), self.bias.to(tokens.dtype)
        return functional.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps)


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then MLP, each as a residual branch."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, hidden_dim)

    def forward(
        self, tokens_TD: Tensor, packing: Packing, drop_scales_2T1: Tensor | None = None, *, only_class: bool = False
    ) -> Tensor:
        """Output of the layer, (T, D), or of the class token of each image alone (images, D); all attend to all.

        `drop_scales_2T1` multiply what the two branches add to the token.
        """
        attended = self.attn(self.norm1(tokens_TD), packing, only_class=only_class)
        kept = class_tokens(tokens_TD, packing) if only_class else tokens_TD
        if drop_scales_2T1 is not None and only_class:
            drop_scales_2T1 = torch.stack([class_tokens(scales_T1, packing) for scales_T1 in drop_scales_2T1])
        kept = _added(kept, attended, drop_scales_2T1, 0)
        return _added(kept, self.mlp(self.norm2(kept)), drop_scales_2T1, 1)


class Attention(nn.Module):
    """Multi-head self-attention with biases on query, key and value; every image by itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_TD: Tensor, packing: Packing, *, only_class: bool = False) -> Tensor:
        """What each token, or only the class token of each image, gathers from all tokens of its image."""
        num_queries = 1 if only_class else None
        mixed = []
        for qkv_BN3 in packing.split(self.qkv(tokens_TD)):
            query, key, value = self._heads(qkv_BN3)
            mixed.append(attend(query[:, :, :num_queries], key, value).transpose(1, 2).flatten(2))
        return self.proj(packed(mixed)[0])  # type: ignore[no-any-return]

    def weights(self, tokens_BND: Tensor, num_queries: int | None = None) -> Tensor:
        """What `forward` weighs the values of all tokens with, (B, heads, Q, N); each row sums to 1."""
        query, key, _ = self._heads(self.qkv(tokens_BND))
        scores = query[:, :, :num_queries] @ key.transpose(-2, -1)
        weights: Tensor = (scores * query.shape[-1] ** -0.5).softmax(dim=-1)
        return weights

    def _heads(self, qkv_BN3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, N, D / heads)."""
        split = qkv_BN3.view(*qkv_BN3.shape[:2], 3, self.num_heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, heads, Q, D / heads). Vaswani et al. 2017, equation 1."""
    # The fused kernel never holds the matrix of scores, and is faster; but its backward pass for half precision on a
    # CPU is not (docs/performance.md).
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if not (is_half and query.device.type == "cpu" and torch.is_grad_enabled()):
        return functional.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):  # which would hold the weights in float32
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        mixed: Tensor = scores.softmax(dim=-1) @ value
        return mixed


class Mlp(nn.Module):
    """Two linear layers around an exact (error function) GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply to each token on its own."""
        return self.fc2(functional.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


def class_tokens(tokens_TD: Tensor, packing: Packing) -> Tensor:
    """The first token of each image, (images, D)."""
    return torch.cat([group_BND[:, 0] for group_BND in packing.split(tokens_TD)])


def _added(tokens: Tensor, branch: Tensor, drop_scales: Tensor | None, number: int) -> Tensor:
    return tokens + branch if drop_scales is None else torch.addcmul(tokens, branch, drop_scales[number])
