"""Vision transformer (Dosovitskiy et al. 2020) as in official DINO and timm, with their parameter names.

Shapes: B images of one size, R of all sizes, C channels, H and W pixels, N tokens (the class token and one per
patch), T tokens of all images, D width, L depth, P pixels of a patch in all channels. `drop_scales_L2R` hold the
stochastic-depth factor of every layer, branch (0 attention, 1 MLP) and image: 0, or one over the probability to keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dino_exp.errors import ConfigError
from dino_exp.models.blocks import NORM_EPS, Block, LayerNorm
from dino_exp.models.packing import packed


class VisionTransformer(nn.Module):
    """Pre-norm transformer over image patches; its output is the class token after the final norm.

    Built without meaningful values: `dino_exp.models.init` gives every parameter one.
    Raises ConfigError for a width that the heads do not divide, or an image that the patches do not.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"model.embed_dim {embed_dim} is no multiple of model.num_heads {num_heads}")
        if image_size < patch_size or image_size % patch_size:
            raise ConfigError(f"data.image_size {image_size} is no multiple of data.patch_size {patch_size}")
        self.embed_dim = embed_dim
        self.base_grid = image_size // patch_size
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.base_grid**2, embed_dim))
        hidden_dim = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, hidden_dim) for _ in range(depth))
        self.norm = LayerNorm(embed_dim, eps=NORM_EPS)
        self.gradient_checkpointing = False  # whether a layer's activations are computed again in the backward pass
        # Constants, so neither parameters nor buffers: no checkpoint and no state_dict carries them.
        self._resize_matrices: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def forward(self, images: Tensor | Sequence[Tensor], drop_scales_L2R: Tensor | None = None) -> Tensor:
        """Normalised class token of each image, (R, D). Images (B, C, H, W) of one size, or of several in turn.

        Any size of at least one patch. All of them pass the layers together: one product for each weight.
        """
        groups = [images] if isinstance(images, Tensor) else images
        tokens_TD, packing = packed([self._embed(group_BCHW) for group_BCHW in groups])
        scales_L2T1 = None if drop_scales_L2R is None else packing.per_token(drop_scales_L2R)
        *before, last = self.blocks
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(before):
            scales_2T1 = None if scales_L2T1 is None else scales_L2T1[layer]
            if again:  # nothing in a layer draws random numbers
                tokens_TD = checkpoint(
                    block, tokens_TD, packing, scales_2T1, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens_TD = block(tokens_TD, packing, scales_2T1)
        # Nothing reads the other tokens of the last block, so only the class token is computed there: the
        # same numbers for two thirds of the arithmetic where there are two layers.
        class_RD = last(tokens_TD, packing, None if scales_L2T1 is None else scales_L2T1[-1], only_class=True)
        return self.norm(class_RD)  # type: ignore[no-any-return]

    def forward_tokens(self, images_BCHW: Tensor) -> Tensor:
        """All tokens of the last block after the final norm, (B, N, D); index 0 is the class token."""
        return self.last_tokens(images_BCHW, 1)[0]

    def last_tokens(self, images_BCHW: Tensor, num_blocks: int) -> list[Tensor]:
        """All tokens after each of the last `num_blocks` blocks and the final norm, each (B, N, D), in order.

        The `get_intermediate_layers` of the official code. Raises ValueError for more blocks than there are.
        """
        if not 1 <= num_blocks <= len(self.blocks):
            raise ValueError(f"the last {num_blocks} of {len(self.blocks)} blocks: expected 1 to {len(self.blocks)}")
        (tokens_TD, packing), found = packed([self._embed(images_BCHW)]), []
        for layer, block in enumerate(self.blocks):
            tokens_TD = block(tokens_TD, packing)
            if layer >= len(self.blocks) - num_blocks:
                found += packing.split(self.norm(tokens_TD))
        return found

    def last_attention(self, images_BCHW: Tensor, num_queries: int | None = None) -> Tensor:
        """How the last block's first `num_queries` tokens (None: all) attend to all: (B, heads, num_queries, N).

        Each row sums to 1. Computed for the caller alone: other passes never hold these weights. With all queries, the
        `get_last_selfattention` of the official code.
        """
        tokens_TD, packing = packed([self._embed(images_BCHW)])
        *before, last = self.blocks
        for block in before:
            tokens_TD = block(tokens_TD, packing)
        assert isinstance(last, Block)
        (tokens_BND,) = packing.split(last.norm1(tokens_TD))
        return last.attn.weights(tokens_BND, num_queries)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image of that size in pixels; a rest at the edge has none."""
        return height // self.patch_embed.patch_size, width // self.patch_embed.patch_size

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        patches_BND = self.patch_embed(images_BCHW)
        cls_B1D = self.cls_token.expand(len(images_BCHW), -1, -1)
        return torch.cat((cls_B1D, patches_BND), dim=1) + self._positions(*images_BCHW.shape[-2:])

    def _positions(self, height: int, width: int) -> Tensor:
        """Position table for an image size in pixels, (1, N, D), as the official code resizes it."""
        rows, cols = self.grid_of(height, width)
        if rows * cols == self.base_grid**2 and height == width:
            return self.pos_embed
        matrix = self._resize_matrix(rows, cols)
        # The official interpolation stays in full precision under autocast; so does this product.
        with torch.autocast(self.pos_embed.device.type, enabled=False):
            patches_1ND = matrix @ self.pos_embed[:, 1:]
        return torch.cat((self.pos_embed[:, :1], patches_1ND), dim=1)

    def _resize_matrix(self, rows: int, cols: int) -> Tensor:
        table = self.pos_embed
        key = (rows, cols, table.dtype, table.device)
        if key not in self._resize_matrices:
            # A teacher in inference mode may ask first; a student must still be able to differentiate.
            with torch.inference_mode(False):
                matrix = resize_matrix(self.base_grid, rows, cols)
                self._resize_matrices[key] = matrix.to(dtype=table.dtype, device=table.device)
        return self._resize_matrices[key]


class PatchEmbed(nn.Module):
    """Patches to tokens, (B, C, H, W) to (B, patches, D), row by row; a rest at the edge is left out."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Embed every patch. The same sums as the convolution that the parameters belong to."""
        # One matrix product: 1.1 to 1.9 times as fast as conv2d on a CPU (8 to 224 px, forward and backward)
        # and its gradient is deterministic on every device.
        size = self.patch_size
        num_images, channels, height, width = images_BCHW.shape
        rows, cols = height // size, width // size
        cut = images_BCHW[:, :, : rows * size, : cols * size]
        grid = cut.reshape(num_images, channels, rows, size, cols, size).permute(0, 2, 4, 1, 3, 5)
        patches_BNP = grid.reshape(num_images, rows * cols, channels * size * size)
        return functional.linear(patches_BNP, self.proj.weight.flatten(1), self.proj.bias)


def resize_matrix(base: int, rows: int, cols: int) -> Tensor:
    """Matrix (rows * cols, base * base), float64, that resizes a square table of positions to a grid.

    It is `resize_grid`, the official bicubic interpolation with its `scale_factor=(grid + 0.1) / base`, applied once
    to the identity. A product with it has a deterministic gradient on CUDA; the interpolation itself has not.
    """
    with torch.no_grad():
        identity = torch.eye(base * base, dtype=torch.float64, device="cpu").reshape(-1, 1, base, base)
        resized = resize_grid(identity, rows, cols)
    return resized.reshape(base * base, rows * cols).T.contiguous()


def resize_grid(grid_NCgg: Tensor, rows: int, cols: int) -> Tensor:
    """Square grids (N, C, g, g) resized to (N, C, rows, cols) by the official interpolation."""
    base = grid_NCgg.shape[-1]
    scale = ((rows + 0.1) / base, (cols + 0.1) / base)
    return functional.interpolate(grid_NCgg, scale_factor=scale, mode="bicubic")
