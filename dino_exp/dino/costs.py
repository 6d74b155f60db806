"""What a step costs, from the dimensions alone: floating-point operations and bytes. Numbers in, numbers out.

A multiplication and its addition count as two operations; a backward pass as twice the matrix products of its forward
pass; what is not a matrix product (norms, softmax, the optimizer) as nothing.

In comments: B images, N tokens, D width, H hidden width of an MLP, K prototypes.
"""

from __future__ import annotations

import itertools
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
    num_heads: int
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
    tokens = dims.num_patches(size) + 1
    blocks = (dims.depth - 1) * _block_flops(dims, tokens, tokens)
    return _embed_flops(dims, size) + blocks + _block_flops(dims, tokens, tokens if every_token else 1)


def _block_flops(dims: Dimensions, tokens: int, queries: int) -> int:
    width = dims.embed_dim
    found = 2 * (queries + 2 * tokens) * width * width  # queries, keys and values
    found += 2 * 2 * queries * tokens * width  # scores and mixing
    return found + 2 * queries * width * width + 2 * 2 * queries * width * dims.mlp_dim


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


def step_flops(dims: Dimensions, *, recomputes: bool = False) -> int:
    """Of an image in a training step: teacher forward, student forward and backward. Pixels need no gradient.

    `recomputes`: the backward pass makes the activations of all layers but the last once more.
    """
    pixels = sum(num * _embed_flops(dims, size) for num, size in dims.crops)
    found = forward_flops(dims, num_local=0) + 3 * forward_flops(dims) - pixels
    if recomputes:
        for num, size in dims.crops:
            tokens = dims.num_patches(size) + 1
            last_product = 2 * tokens * dims.embed_dim * dims.mlp_dim  # nothing needs what it gives
            found += num * (dims.depth - 1) * (_block_flops(dims, tokens, tokens) - last_product)
    return found


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
    in_parts: bool

    @property
    def lasting(self) -> int:
        """What is there between two steps."""
        return self.weights + self.teacher + self.moments

    @property
    def peak(self) -> int:
        """At once, at most: gradients come as activations go, but those of earlier parts are there already."""
        return self.lasting + (self.passing + self.gradients if self.in_parts else max(self.passing, self.gradients))


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How a step is computed: in half precision, by layers that are written out (`models.half`), activations twice, the
    images in several parts that add up to its gradients.

    Layers that are written out keep the scores of attention; weights are rounded again, and what follows a GELU is made
    again, when the backward pass comes to them.
    """

    half: bool = False
    written_out: bool = False
    recomputes: bool = False
    in_parts: bool = False

    @property
    def number(self) -> int:
        """Bytes of an activation."""
        return HALF if self.half else FLOAT


def step_memory(
    dims: Dimensions,
    arithmetic: Arithmetic,
    *,
    num_parameters: int,
    num_trained: int,
    batch_size: int,
    moments: int,
) -> StepMemory:
    """Of a step over `batch_size` images at once; `moments`: as `MOMENTS` has it.

    Within 10 % of all tensors of real steps on a CPU (of sixteen settings -8 to +8), from ViT-nano with 256 prototypes
    to ViT-S with 65,536, in both precisions. An allocator takes more than that.
    """
    weights, gradients = FLOAT * num_parameters, FLOAT * num_trained
    half, number = arithmetic.half, arithmetic.number
    passing = batch_size * sum(num * _pixel_bytes(dims, size, number) for num, size in dims.crops)
    passing += HALF * _num_rounded(dims, arithmetic, num_trained)
    *blocks, last = _block_bytes(dims, arithmetic)
    head = batch_size * _mlp_bytes(dims, half) + _logit_bytes(dims, batch_size, half)
    if (
        arithmetic.recomputes
    ):  # of a block only what it begins with; one is whole while it goes backward, after the head
        tokens = sum(num * (dims.num_patches(size) + 1) for num, size in dims.crops)
        whole = max(blocks, default=0) + tokens * (number * dims.mlp_dim + 2 * FLOAT * dims.embed_dim)
        passing += batch_size * len(blocks) * FLOAT * dims.embed_dim * tokens
        passing += max(
            head + batch_size * last, batch_size * whole + FLOAT * head_flops(dims) // 2
        )  # and its gradients
    else:
        passing += head + batch_size * (sum(blocks) + last)
    return StepMemory(
        weights=weights,
        teacher=weights,
        moments=moments * gradients,
        gradients=gradients,
        passing=passing,
        in_parts=arithmetic.in_parts,
    )


def _num_rounded(dims: Dimensions, arithmetic: Arithmetic, num_trained: int) -> int:
    """How many weights are kept in half precision for the backward pass. Those of prototypes never are."""
    if not arithmetic.half:
        return 0
    if arithmetic.written_out:
        return sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(dims.head_widths))
    return num_trained - dims.num_prototypes * dims.head_widths[-1]


def _pixel_bytes(dims: Dimensions, size: int, number: int) -> int:
    """The pixels of a crop, as they are and cut into patches, and what is made of the patches."""
    pixels = dims.channels * size * size * (FLOAT + number)
    return pixels + FLOAT * (dims.num_patches(size) + 1) * dims.embed_dim


def _block_bytes(dims: Dimensions, arithmetic: Arithmetic) -> list[int]:
    """What the backward pass needs of each block, for the crops of an image: inputs of matrix products, and the
    residual stream, which is never half."""
    width, found = dims.embed_dim, [0] * dims.depth
    for num, size in dims.crops:
        tokens = dims.num_patches(size) + 1
        for layer in range(dims.depth):
            queries = tokens if layer < dims.depth - 1 else 1
            values = (3 * tokens + 2 * queries) * width  # normalised input, keys, values; queries and the mixture,
            values += queries * (tokens * dims.num_heads if arithmetic.written_out else width)  # and how it is made
            hidden = 1 if arithmetic.written_out else 2  # before GELU, and after it
            values += queries * (width + hidden * dims.mlp_dim)  # with the normalised input of the MLP
            found[layer] += num * (arithmetic.number * values + FLOAT * (tokens + queries) * width)
    return found


def _mlp_bytes(dims: Dimensions, half: bool) -> int:
    """What the backward pass needs of the head's MLP, for the crops of an image."""
    kept = 3 if dims.head_norms else 2  # of each hidden layer: its product, perhaps normalised, and after GELU
    numbers = dims.head_widths[0] + kept * sum(dims.head_widths[1:-1]) + 2 * dims.head_widths[-1]
    return (NUM_GLOBAL + dims.num_local) * (HALF if half else FLOAT) * numbers


def _logit_bytes(dims: Dimensions, batch_size: int, half: bool) -> int:
    """Logits, and what the loss and the prototypes make of them, at the fuller of two moments of the step."""
    number = HALF if half else FLOAT
    targets, student = (batch_size * num * dims.num_prototypes for num in (NUM_GLOBAL, NUM_GLOBAL + dims.num_local))
    kept = 2 * number * student + (number + FLOAT) * targets  # logits with their gradient; the teacher's, and softmax
    in_loss = 4 * FLOAT * batch_size * dims.num_prototypes  # one view, its target, the sum of all, its gradient
    in_prototypes = number * student + FLOAT * dims.num_prototypes * dims.head_widths[-1]
    return kept + max(in_loss, in_prototypes)
