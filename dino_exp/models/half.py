"""Linear layers, attention and MLP in bfloat16 on a CPU, in fewer passes over memory than torch's operators make.

The products are the same (tests/unit/test_models_half.py; where this was measured, so was every bit). What is spared
(docs/performance.md): a bias written to memory before the product is added to it, gradients stacked and sorted that can
be written in their places, a second tensor as large as the MLP's hidden layer.

Shapes: T tokens of all images, B images of one size with N tokens each, I inputs and O outputs of a layer, D width,
H hidden width of an MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dino_exp.models.packing import Packing

_HALF = torch.bfloat16


def is_for(tensor: Tensor) -> bool:
    """Whether autocast has `tensor` multiplied in bfloat16, on a CPU for which oneDNN can, outside compiled code."""
    return (
        tensor.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == _HALF
        and not torch.compiler.is_compiling()
        # The product with its bias that torch's own compiler calls; there is no public name for it.
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def linear(tokens_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """`functional.linear`, (T, O)."""
    if not is_for(tokens_TI):
        return functional.linear(tokens_TI, weight_OI, bias_O)
    product_TO: Tensor = _Linear.apply(tokens_TI.to(_HALF), weight_OI, bias_O)  # type: ignore[no-untyped-call]
    return product_TO


def mlp(tokens_TD: Tensor, weight_HD: Tensor, bias_H: Tensor, weight_DH: Tensor, bias_D: Tensor) -> Tensor:
    """Two linear layers around an exact (error function) GELU, (T, D)."""
    if not is_for(tokens_TD):
        hidden_TH = functional.gelu(functional.linear(tokens_TD, weight_HD, bias_H))
        return functional.linear(hidden_TH, weight_DH, bias_D)
    found_TD: Tensor = _Mlp.apply(tokens_TD.to(_HALF), weight_HD, bias_H, weight_DH, bias_D)  # type: ignore[no-untyped-call]
    return found_TD


def attention(qkv_T3: Tensor, packing: Packing, num_heads: int) -> Tensor:
    """What each token gathers from all tokens of its image, (T, D), with queries, keys and values (T, 3 D)."""
    mixed_TD: Tensor = _Attention.apply(qkv_T3, packing, num_heads)  # type: ignore[no-untyped-call]
    return mixed_TD


def scaled_product(one: Tensor, other: Tensor, scale: float) -> Tensor:
    """`scale * one @ other` of batches of matrices, scaled before it is rounded."""
    # `beta=0`: nothing is added, so the first argument gives the type alone.
    return torch.baddbmm(one.new_empty(()), one, other, beta=0, alpha=scale)


def by_head(values_BNx: Tensor, kinds: int, num_heads: int) -> Tensor:
    """Values of some kinds that lie beside each other, (B, N, kinds D), as (kinds, B, heads, N, D / heads): a view."""
    num_images, num_tokens, _ = values_BNx.shape
    return values_BNx.view(num_images, num_tokens, kinds, num_heads, -1).permute(2, 0, 3, 1, 4)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_TI, weight_OI)
        return _product(tokens_TI, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens_TI, weight_OI = ctx.saved_tensors
        return gradient_TO @ weight_OI.to(_HALF), *_of_parameters(gradient_TO, tokens_TI, weight_OI.dtype)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens_TD: Tensor, weight_HD: Tensor, bias_H: Tensor, weight_DH: Tensor, bias_D: Tensor
    ) -> Tensor:
        before_TH = _product(tokens_TD, weight_HD, bias_H)
        # What comes after the GELU is made again for the backward pass: kept, it is as large as what comes before.
        ctx.save_for_backward(tokens_TD, weight_HD, weight_DH, before_TH)
        return _product(functional.gelu(before_TH), weight_DH, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, ...]:
        tokens_TD, weight_HD, weight_DH, before_TH = ctx.saved_tensors
        of_second = _of_parameters(gradient_TD, functional.gelu(before_TH), weight_DH.dtype)
        hidden_TH = gradient_TD @ weight_DH.to(_HALF)
        torch.ops.aten.gelu_backward.grad_input(hidden_TH, before_TH, grad_input=hidden_TH)  # in place
        of_first = _of_parameters(hidden_TH, tokens_TD, weight_HD.dtype)
        return hidden_TH @ weight_HD.to(_HALF), *of_first, *of_second


def _product(tokens_TI: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    # Weights are rounded again for the backward pass: of all layers together they would be kept for as long.
    rounded = weight_OI.to(_HALF), bias_O.to(_HALF)
    product_TO: Tensor = torch.ops.mkldnn._linear_pointwise(tokens_TI, *rounded, "none", [], "")
    return product_TO


def _of_parameters(gradient_TO: Tensor, tokens_TI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias. Tokens may lie along several axes."""
    gradient_TO, tokens_TI = gradient_TO.flatten(0, -2), tokens_TI.flatten(0, -2)
    return (gradient_TO.T @ tokens_TI).to(dtype), gradient_TO.sum(dim=0).to(dtype)


class _Attention(torch.autograd.Function):
    """Heads are sorted by themselves once; so are the gradients, into the rows that they belong to."""

    @staticmethod
    def forward(ctx: Any, qkv_T3: Tensor, packing: Packing, num_heads: int) -> Tensor:
        mixed_TD = qkv_T3.new_empty(len(qkv_T3), qkv_T3.shape[1] // 3)
        saved = []
        for qkv_BN3, mixed_BND in zip(packing.split(qkv_T3), packing.split(mixed_TD), strict=True):
            # One by one, not as one tensor: freed memory of these sizes is found again, and the peak is lower.
            query, key, value = (each.flatten(0, 1) for each in by_head(qkv_BN3, 3, num_heads))
            weights = scaled_product(query, key.mT, query.shape[-1] ** -0.5).softmax(dim=-1)
            (place,) = by_head(mixed_BND, 1, num_heads)
            place.copy_((weights @ value).view(place.shape))
            saved += [query, key, value, weights]
        ctx.save_for_backward(*saved)
        ctx.packing, ctx.num_heads = packing, num_heads
        return mixed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        of_qkv_T3 = gradient_TD.new_empty(len(gradient_TD), 3 * gradient_TD.shape[1])
        of_groups = zip(ctx.packing.split(of_qkv_T3), ctx.packing.split(gradient_TD), strict=True)
        saved = iter(ctx.saved_tensors)
        for (of_qkv_BN3, gradient_BND), (query, key, value, weights) in zip(
            of_groups, zip(saved, saved, saved, saved, strict=True), strict=True
        ):
            gradient = by_head(gradient_BND, 1, ctx.num_heads).flatten(0, 2)
            of_scores = torch._softmax_backward_data(gradient @ value.mT, weights, -1, weights.dtype)
            scale = query.shape[-1] ** -0.5
            of_query, of_key = scaled_product(of_scores, key, scale), scaled_product(of_scores.mT, query, scale)
            places = by_head(of_qkv_BN3, 3, ctx.num_heads)
            for place, found in zip(places, (of_query, of_key, weights.mT @ gradient), strict=True):
                place.copy_(found.view(place.shape))
        return of_qkv_T3, None, None
