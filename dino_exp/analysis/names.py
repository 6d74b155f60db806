"""What the names of tensors tell: their part, their block, and where in the network they are. Pure."""

from __future__ import annotations

import re

_BLOCK_NUMBER = re.compile(r"(?:.*\.)?blocks\.(\d+)")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_EARLY = ("cls_token", "pos_embed", "patch_embed")


def part_of(tensor: str) -> str:
    """What the name begins with: `student`, `teacher`, `optimizer`, `loss`."""
    return tensor.partition(".")[0]


def block_of(tensor: str) -> str:
    """Where in its part a tensor is: `backbone.blocks.7` of `teacher.backbone.blocks.7.attn.qkv.weight`.

    Up to and with the first number, or else two names: `backbone.norm`, `head.last_layer`, `center`.
    """
    _, *names = tensor.split(".")
    numbers = [index for index, name in enumerate(names) if name.isdecimal()]
    return ".".join(names[: numbers[0] + 1 if numbers else 2]) or tensor


def is_statistic(tensor: str) -> bool:
    """Whether it is a statistic of batch norm, which follows the data: no weight, and nobody learns it."""
    return tensor.rpartition(".")[2] in _STATISTICS


def place_in_network(name: str) -> tuple[int, int, str]:
    """A key to sort tensors or blocks by: what comes before the blocks, the blocks by number, and what comes behind."""
    numbered = _BLOCK_NUMBER.match(name)
    if numbered:
        return 1, int(numbered[1]), ""
    early = any(word in name for word in _EARLY)
    return (0, 0, name) if early else (2, "head" in name, name)


def short_name(name: str) -> str:
    """A tensor or block for a picture: `block 3 qkv` of `backbone.blocks.3.attn.qkv.weight`."""
    bare = name.removeprefix("backbone.").removesuffix(".weight").removesuffix(".weight_v")
    return bare.replace("blocks.", "block ").replace(".attn.", " ").replace("head.last_layer", "prototypes")
