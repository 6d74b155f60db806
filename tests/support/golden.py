"""The official code's values in float64, and the formulae that make its inputs and parameters."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.models.head import DINOHead
from dino_exp.models.vit import VisionTransformer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dino_trace.json").read_text())
A, B = GOLDEN["A_norm_last_layer_true"], GOLDEN["B_norm_last_layer_false"]
NUM_PROTOTYPES = 48
BATCH = 4


def exactly(expected):
    return pytest.approx(expected, abs=1e-9, rel=1e-9)


def waves(rows: int, columns: int, phase: float) -> Tensor:
    index = torch.arange(rows * columns, dtype=torch.float64)
    return (torch.sin(0.7 * index + phase) + 0.3 * torch.cos(0.013 * index**2 + phase)).view(rows, columns)


def images(num: int, size: int, phase: float) -> Tensor:
    index = torch.arange(num * 3 * size * size, dtype=torch.float64)
    values = torch.sin(0.05 * index + phase) + 0.5 * torch.cos(0.0031 * index * (1 + phase))
    return values.view(num, 3, size, size)


def formula_model(*, norm_last_layer: bool) -> MultiCropModel:
    backbone = VisionTransformer(image_size=32, patch_size=8, in_channels=3, embed_dim=32, depth=2, num_heads=4)
    head = DINOHead(
        in_dim=32,
        out_dim=NUM_PROTOTYPES,
        hidden_dim=64,
        bottleneck_dim=16,
        use_bn=False,
        norm_last_layer=norm_last_layer,
    )
    model = MultiCropModel(backbone, head).double()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        values = 0.2 * torch.sin(0.37 * index + 1.3 * number + 0.1)
        if name.endswith("weight_g"):
            values = torch.ones_like(values)
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        parameter.data.copy_(values.view_as(parameter))
    return model
