"""What an export writes, format by format, as named bytes; `placing` puts them onto the disk.

Equal checkpoints give equal bytes: nothing here reads a clock, a host or a path.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dino_exp.weights.architecture import ARCHITECTURE, FACTS, Architecture
from dino_exp.weights.names import to_hub

if TYPE_CHECKING:
    from torch import Tensor

Format: TypeAlias = Literal["safetensors", "hf", "pth"]
FORMATS: tuple[Format, ...] = ("safetensors", "hf", "pth")
SUFFIXES = {"safetensors": (".safetensors",), "pth": (".pth", ".pt"), "hf": ()}  # hf is a folder

HUB_CONFIG, HUB_WEIGHTS, HUB_PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
HUB_FILES = (HUB_CONFIG, HUB_WEIGHTS, HUB_PREPROCESSOR)

_NORM_EPS = 1e-6  # of every layer norm in `models.vit`; HuggingFace's default is another
_PILLOW_BICUBIC = 3


def metadata_of(facts: Mapping[str, Any], part: str, architecture: Architecture) -> dict[str, str]:
    """The `__metadata__` of a safetensors file: texts, the architecture among them as JSON. Unknown facts are left out.

    `format: pt` is what HuggingFace's loaders ask for.
    """
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    known = {name: text for name, text in texts.items() if text != "null"}
    shown = json.dumps(architecture.as_json(), sort_keys=True)
    return {"format": "pt", "producer": "dino_exp", **known, "part": part, ARCHITECTURE: shown}


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file. The library writes metadata in another order each time, so here it is sorted."""
    import safetensors.torch

    data = safetensors.torch.save(dict(tensors))
    end = 8 + int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8:end])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + data[end:]


def hub_files(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], architecture: Architecture, settings: Mapping[str, Any]
) -> dict[str, bytes]:
    """The folder that `transformers.ViTModel.from_pretrained` reads, with the Hub's names.

    `preprocessor_config.json` is there only where HuggingFace has a processor that does what evaluation here does.
    """
    files = {
        HUB_CONFIG: _json(hub_config(architecture, metadata)),
        HUB_WEIGHTS: safetensors_bytes(to_hub(tensors), metadata),
    }
    preprocessor = hub_preprocessor(architecture, settings)
    return files if preprocessor is None else {**files, HUB_PREPROCESSOR: _json(preprocessor)}


def hub_config(architecture: Architecture, metadata: Mapping[str, str]) -> dict[str, Any]:
    """`config.json` of a ViT without pooling layer; where it comes from is under `dino_exp`."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": architecture.embed_dim,
        "num_hidden_layers": architecture.depth,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.hidden_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": _NORM_EPS,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "num_channels": architecture.in_channels,
        "qkv_bias": True,
        FACTS: {name: text for name, text in sorted(metadata.items()) if name not in ("format", ARCHITECTURE)},
    }


def hub_preprocessor(architecture: Architecture, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Central square, bicubic, normalised as in training: for the colour images of `augment=dino`, else None.

    What `augment=digits` does to grey images (ink statistics, bilinear, edges repeated) no processor of theirs does.
    """
    if settings.get("augment", {}).get("name") != "dino" or architecture.in_channels != 3:
        return None
    from dino_exp.data.augment_dino import IMAGENET_MEAN, IMAGENET_STD

    size = architecture.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",  # of theirs the one that cuts out the square; ViT's squeezes
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": _PILLOW_BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def official_checkpoint(
    models: Mapping[str, Mapping[str, Tensor]], center_1K: Tensor | None, epoch: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What the official code keeps in `checkpoint.pth`, as far as it is ours to give: no arguments, no optimizer.

    `models`: the tensors of `student` and `teacher`, or of one of them, under `backbone.` and `head.`. The student's
    carry `module.`, because there it is wrapped. `epoch` counts the epochs done.
    """
    made: dict[str, Any] = {}
    for part, tensors in models.items():
        prefix = "module." if part == "student" else ""
        made[part] = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    if center_1K is not None:
        made["dino_loss"] = {"center": center_1K}
    return {**made, "epoch": epoch, FACTS: dict(facts)}


def torch_bytes(value: Mapping[str, Any]) -> bytes:
    """A file of `torch.save` that `torch.load(weights_only=True)` reads: dictionaries, tensors and plain values."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(value), buffer)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
