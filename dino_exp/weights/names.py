"""What tensors are called elsewhere. Here they have the names of the official code, which are also timm's.

D width, H hidden width of a block's MLP. HuggingFace's names are those of the Hub's files (`encoder.layer.N...`),
which every version of `transformers` reads; in memory its version 5 has others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Part: TypeAlias = Literal["teacher", "student"]
PARTS: tuple[Part, ...] = ("teacher", "student")
WRAPPERS = (*PARTS, "state_dict", "model")  # keys under which a training program keeps its model, best first

_TO_HUB = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_BLOCK_TO_HUB = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_FROM_HUB = {hub: name for name, hub in _TO_HUB.items()}
_BLOCK_FROM_HUB = {hub: name for name, hub in _BLOCK_TO_HUB.items()}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_HUB_BLOCK = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_WRAPPED = re.compile(r"(?:module\.|_orig_mod\.)*(.+)", re.DOTALL)


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of one model: of its backbone and of its head, each under the official names, and all others."""

    backbone: Mapping[str, Tensor]
    head: Mapping[str, Tensor]


def to_hub(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone under the Hub's names; `qkv` (3D, D) becomes three tensors of (D, D), and its bias alike."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = _BLOCK.fullmatch(name)
        if found is None:
            renamed[_TO_HUB[name]] = tensor
        elif found[2] == "attn.qkv":
            for part, third in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"encoder.layer.{found[1]}.{part}.{found[3]}"] = third.contiguous()
        else:
            renamed[f"encoder.layer.{found[1]}.{_BLOCK_TO_HUB[found[2]]}.{found[3]}"] = tensor
    return renamed


def from_hub(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hub`. A name that is not of a backbone stays as it is."""
    import torch

    bare = {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in bare.items():
        found = _HUB_BLOCK.fullmatch(name)
        if found is None:
            renamed[_FROM_HUB.get(name, name)] = tensor
        elif found[2] in _BLOCK_FROM_HUB:
            renamed[f"blocks.{found[1]}.{_BLOCK_FROM_HUB[found[2]]}.{found[3]}"] = tensor
        elif found[2] == _QKV[0]:
            thirds = [bare.get(f"encoder.layer.{found[1]}.{part}.{found[3]}") for part in _QKV]
            present = [third for third in thirds if third is not None and third.ndim]
            alike = {(third.shape, third.dtype) for third in present}
            if len(alike) == 1 and len(present) == len(_QKV):
                renamed[f"blocks.{found[1]}.attn.qkv.{found[3]}"] = torch.cat(present)
        elif found[2] not in _QKV:
            renamed[name] = tensor
    return renamed


def is_hub(names: Mapping[str, object]) -> bool:
    """Whether tensors have the names of HuggingFace's ViT."""
    return "embeddings.cls_token" in names or "vit.embeddings.cls_token" in names


def split_model(tensors: Mapping[str, Tensor]) -> ModelTensors:
    """Sort a model's tensors into backbone and head, without the prefixes of wrappers (`module.`, `backbone.`).

    A file without `backbone.` is a backbone alone; what it calls `head.` is then a classifier or DINO's head.
    """
    bare = {found[1]: tensor for name, tensor in tensors.items() if (found := _WRAPPED.fullmatch(name)) is not None}
    if is_hub(bare):
        bare = from_hub(bare)
    head = {name.removeprefix("head."): tensor for name, tensor in bare.items() if name.startswith("head.")}
    rest = {name.removeprefix("backbone."): tensor for name, tensor in bare.items() if not name.startswith("head.")}
    return ModelTensors(backbone=rest, head=head)


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
