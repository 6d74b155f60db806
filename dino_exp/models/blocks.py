"""The layers of a vision transformer, on tokens of images of several sizes in one row.

Shapes: T tokens of all images, B images of one size with N tokens each, Q of them asked for, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dino_exp.models import half
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
        if only_class:
            mixed_TD = self._of_class(tokens_TD, packing)
        else:
            qkv_T3 = half.linear(tokens_TD, self.qkv.weight, self.qkv.bias)
            if half.is_for(qkv_T3):
                mixed_TD = half.attention(qkv_T3, packing, self.num_heads)
            else:
                mixed_TD, _ = packed(
                    [_joined(attend(*half.by_head(qkv_BN3, 3, self.num_heads))) for qkv_BN3 in packing.split(qkv_T3)]
                )
        return half.linear(mixed_TD, self.proj.weight, self.proj.bias)

    def _of_class(self, tokens_TD: Tensor, packing: Packing) -> Tensor:
        """What the class token of each image gathers, (images, D): no other token asks."""
        dim = tokens_TD.shape[1]
        weight_DD, weight_2DD = torch.split(self.qkv.weight, [dim, 2 * dim])
        bias_D, bias_2D = torch.split(self.qkv.bias, [dim, 2 * dim])
        query_RD = half.linear(class_tokens(tokens_TD, packing), weight_DD, bias_D)
        key_value_T2 = half.linear(tokens_TD, weight_2DD, bias_2D)
        mixed = []
        for query_BD, key_value_BN2 in zip(packing.split_images(query_RD), packing.split(key_value_T2), strict=True):
            (query,) = half.by_head(query_BD[:, None], 1, self.num_heads)
            key, value = half.by_head(key_value_BN2, 2, self.num_heads)
            mixed.append(_joined(attend(query, key, value))[:, 0])
        return torch.cat(mixed)

    def weights(self, tokens_BND: Tensor, num_queries: int | None = None) -> Tensor:
        """What `forward` weighs the values of all tokens with, (B, heads, Q, N); each row sums to 1."""
        query, key, _ = half.by_head(self.qkv(tokens_BND), 3, self.num_heads)
        scores = query[:, :, :num_queries] @ key.transpose(-2, -1)
        weights: Tensor = (scores * query.shape[-1] ** -0.5).softmax(dim=-1)
        return weights


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention, (B, heads, Q, D / heads). Vaswani et al. 2017, equation 1."""
    # The fused kernel never holds the matrix of scores, but in half precision on a CPU it takes twice the time of two
    # products (docs/performance.md).
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if not (is_half and query.device.type == "cpu"):
        return functional.scaled_dot_product_attention(query, key, value)
    shape = query.shape
    query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
    with torch.autocast("cpu", enabled=False):  # which would hold the weights in float32
        mixed = half.scaled_product(query, key.mT, query.shape[-1] ** -0.5).softmax(dim=-1) @ value
    return mixed.view(shape)


def _joined(mixed: Tensor) -> Tensor:
    """The heads beside each other, (B, Q, D)."""
    return mixed.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers around an exact (error function) GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply to each token on its own."""
        return half.mlp(tokens, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)


def class_tokens(tokens_TD: Tensor, packing: Packing) -> Tensor:
    """The first token of each image, (images, D)."""
    return torch.cat([group_BND[:, 0] for group_BND in packing.split(tokens_TD)])


def _added(tokens: Tensor, branch: Tensor, drop_scales: Tensor | None, number: int) -> Tensor:
    return tokens + branch if drop_scales is None else torch.addcmul(tokens, branch, drop_scales[number])
