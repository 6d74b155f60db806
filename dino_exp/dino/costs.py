"""What a step costs, from the dimensions alone: floating-point operations and bytes. Numbers in, numbers out.

A multiplication and its addition count as two operations; a backward pass as twice the matrix products of its forward
pass; what is not a matrix product (norms, softmax, the optimizer) as nothing.

In comments: B images, N tokens, D width, H hidden width of an MLP, K prototypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

NUM_GLOBAL = 2
FLOAT, HALF = 4, 2  # bytes
MOMENTS = {"adamw": 2, "sgd": 1, "lars": 1}  # of the size of a parameter, that an optimizer keeps


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """A model and the crops that it sees. `head_widths`: of the head's MLP, from the features to the bottleneck."""

    channels: int
    patch_size: int
    embed_dim: int
    depth: int
    mlp_dim: int
    head_widths: tuple[int, ...]
    head_norms: bool
    num_prototypes: int
    global_size: int
    local_size: int
    num_local: int

    @property
    def crops(self) -> tuple[tuple[int, int], ...]:
        """How many crops of an image there are of which size in pixels."""
        return (NUM_GLOBAL, self.global_size), (self.num_local, self.local_size)

    def num_patches(self, size: int) -> int:
        """Patches of a crop."""
        return (size // self.patch_size) ** 2


def backbone_flops(dims: Dimensions, size: int, *, every_token: bool = False) -> int:
    """Of one crop's forward pass. The last block goes on with the class token only, unless `every_token`."""
    width, patches = dims.embed_dim, dims.num_patches(size)
    tokens = patches + 1
    found = _embed_flops(dims, size)
    for layer in range(dims.depth):
        queries = tokens if every_token or layer < dims.depth - 1 else 1
        found += 2 * tokens * width * 3 * width  # queries, keys and values
        found += 2 * 2 * queries * tokens * width  # scores and mixing
        found += 2 * queries * width * width + 2 * 2 * queries * width * dims.mlp_dim
    return found


def _embed_flops(dims: Dimensions, size: int) -> int:
    return 2 * dims.num_patches(size) * dims.channels * dims.patch_size**2 * dims.embed_dim


def head_flops(dims: Dimensions) -> int:
    """Of one crop's features."""
    layers = sum(2 * fan_in * fan_out for fan_in, fan_out in itertools.pairwise(dims.head_widths))
    return layers + 2 * dims.head_widths[-1] * dims.num_prototypes


def forward_flops(dims: Dimensions, *, num_local: int | None = None, every_token: bool = False) -> int:
    """Of an image: all its crops through backbone and head. `num_local`: of that many local crops, 0 for a teacher."""
    num_local = dims.num_local if num_local is None else num_local
    backbone = NUM_GLOBAL * backbone_flops(dims, dims.global_size, every_token=every_token)
    backbone += num_local * backbone_flops(dims, dims.local_size, every_token=every_token)
    return backbone + (NUM_GLOBAL + num_local) * head_flops(dims)


def step_flops(dims: Dimensions) -> int:
    """Of an image in a training step: teacher forward, student forward and backward. Pixels need no gradient."""
    pixels = sum(num * _embed_flops(dims, size) for num, size in dims.crops)
    return forward_flops(dims, num_local=0) + 3 * forward_flops(dims) - pixels


def usual_step_flops(dims: Dimensions) -> int:
    """The same as others count it, and as the official code computes it: every token in the last block.

    113.8 GFLOP for ViT-S/16 with 2 x 224 and 8 x 96 pixels and 65,536 prototypes. Pixels are given a gradient here.
    """
    return forward_flops(dims, num_local=0, every_token=True) + 3 * forward_flops(dims, every_token=True)


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on the device. `passing`: crops, activations and what the loss needs, of what is computed at once."""

    weights: int
    teacher: int
    moments: int
    gradients: int
    passing: int

    @property
    def lasting(self) -> int:
        """What is there between two steps."""
        return self.weights + self.teacher + self.moments

    @property
    def peak(self) -> int:
        """At once, at most: gradients come as activations go."""
        return self.lasting + max(self.passing, self.gradients)


def step_memory(
    dims: Dimensions, *, num_parameters: int, num_trained: int, batch_size: int, moments: int, half: bool
) -> StepMemory:
    """Of a step over `batch_size` images at once. `half`: bfloat16 autocast; `moments`: as `MOMENTS` has it.

    Within 10 % of all tensors of real steps on a CPU, from ViT-nano with 256 prototypes to ViT-S with 65,536, in both
    precisions. An allocator takes more than that, and so does a kernel of attention that keeps its scores.
    """
    weights, gradients = FLOAT * num_parameters, FLOAT * num_trained
    passing = sum(num * _crop_bytes(dims, size, half) for num, size in dims.crops) * batch_size
    passing += HALF * num_trained if half else 0  # the weights that autocast made of others
    passing += batch_size * _mlp_bytes(dims, half) + _logit_bytes(dims, batch_size, half)
    return StepMemory(
        weights=weights,
        teacher=weights,
        moments=moments * gradients,
        gradients=gradients,
        passing=passing,
    )


def _crop_bytes(dims: Dimensions, size: int, half: bool) -> int:
    """The pixels, and what the backward pass needs of a crop."""
    width, tokens = dims.embed_dim, dims.num_patches(size) + 1
    number = HALF if half else FLOAT
    pixels = dims.channels * size * size * (FLOAT + number)  # as they are and cut into patches
    blocks = sum(number * values + FLOAT * residual for values, residual in _block_values(dims, tokens))
    return pixels + FLOAT * tokens * width + blocks


def _block_values(dims: Dimensions, tokens: int) -> Iterator[tuple[int, int]]:
    """For each block, how many numbers it keeps: inputs of matrix products, and the residual stream (never half)."""
    width = dims.embed_dim
    for layer in range(dims.depth):
        queries = tokens if layer < dims.depth - 1 else 1
        attention = tokens * 4 * width + queries * width  # normalised input, queries, keys and values; the mixture
        mlp = queries * (width + 2 * dims.mlp_dim)  # normalised input, before and after GELU
        yield attention + mlp, (tokens + queries) * width


def _mlp_bytes(dims: Dimensions, half: bool) -> int:
    """What the backward pass needs of the head's MLP, for the crops of an image."""
    kept = 3 if dims.head_norms else 2  # of each hidden layer: its product, perhaps normalised, and after GELU
    numbers = dims.head_widths[0] + kept * sum(dims.head_widths[1:-1]) + 2 * dims.head_widths[-1]
    return (NUM_GLOBAL + dims.num_local) * (HALF if half else FLOAT) * numbers


def _logit_bytes(dims: Dimensions, batch_size: int, half: bool) -> int:
    """Logits, and what the loss and the prototypes make of them, at the fuller of two moments of the step."""
    number, prototypes = HALF if half else FLOAT, dims.num_prototypes * dims.head_widths[-1]
    targets, student = (batch_size * num * dims.num_prototypes for num in (NUM_GLOBAL, NUM_GLOBAL + dims.num_local))
    kept = 2 * number * student + (number + FLOAT) * targets  # logits with their gradient; the teacher's, and softmax
    in_loss = 4 * FLOAT * batch_size * dims.num_prototypes  # one view, its target, the sum of all, its gradient
    in_prototypes = number * student + prototypes * (FLOAT + (HALF if half else 0))
    return kept + max(in_loss, in_prototypes)
