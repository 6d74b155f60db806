"""What `benchmarks.checkpoint` measures on: a state of real size, a folder of thousands of checkpoints."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_exp.checkpoint.canonical import SEAL_BYTES
from dino_exp.checkpoint.policies import BestN, KeepAny, LatestN, Milestones, Pinned, milestone_from_text
from dino_exp.checkpoint.types import CheckpointInfo, Schedule
from dino_exp.checkpoint.writing import SaveRequest
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.models.head import DINOHead
from dino_exp.models.init import materialise
from dino_exp.models.vit import VisionTransformer

NUM_PROTOTYPES = 65_536
SCHEDULE = Schedule(horizon_steps=1_000_000, steps_per_epoch=1_000)
KEEP = KeepAny(
    (
        LatestN(3),
        BestN("knn_top1", "max", 3),
        BestN("loss", "min", 1),
        Milestones(tuple(milestone_from_text(text) for text in ("25%", "50%", "75%", "100%"))),
        Pinned(),
    )
)


class NamedTensors:
    """A state that is nothing but named tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def vit_s_model(*, image_size: int, patch_size: int, channels: int, num_prototypes: int) -> MultiCropModel:
    """ViT-S and its head, as the paper has them."""

    def make() -> MultiCropModel:
        backbone = VisionTransformer(
            image_size=image_size, patch_size=patch_size, in_channels=channels, embed_dim=384, depth=12, num_heads=6
        )
        head = DINOHead(
            in_dim=384,
            out_dim=num_prototypes,
            hidden_dim=2048,
            bottleneck_dim=256,
            use_bn=False,
            norm_last_layer=True,
        )
        return MultiCropModel(backbone, head)

    return materialise(make, seed=0, scheme="official")


def vit_s_state() -> NamedTensors:
    """Student, teacher and AdamW's moments of ViT-S/16 with K = 65,536, and the centre."""
    model = vit_s_model(image_size=224, patch_size=16, channels=3, num_prototypes=NUM_PROTOTYPES)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors: dict[str, Tensor] = {}
    for part in ("student", "teacher"):
        tensors |= {f"{part}.{name}": value.clone() for name, value in model.state_dict().items()}
    for name in trained:
        value = model.state_dict()[name]
        tensors[f"optimizer.{name}.step"] = torch.tensor(1000.0)
        tensors |= {f"optimizer.{name}.{moment}": value.square() for moment in ("exp_avg", "exp_avg_sq")}
    tensors["loss.center"] = torch.zeros(1, NUM_PROTOTYPES)
    return NamedTensors(tensors)


def save_request(step: int) -> SaveRequest:
    return SaveRequest(
        step=step,
        epoch=step // SCHEDULE.steps_per_epoch,
        schedule=SCHEDULE,
        metrics={"knn_top1": step * 7919 % 10_007 / 10_007, "loss": 1 + 1 / step},
        record={"config_hash": "c1:" + "0" * 64, "git_commit": "f" * 40, "code_id": "e" * 64},
    )


def checkpoint_infos(num: int) -> list[CheckpointInfo]:
    """Facts of `num` checkpoints: two metrics, one of them sometimes NaN, some not verified."""
    return [
        CheckpointInfo(
            step=100 * number,
            epoch=number // 10,
            metrics={"knn_top1": number * 7919 % 10_007 / 10_007, "loss": 1 / number if number % 50 else math.nan},
            verified=number % 3 > 0,
        )
        for number in range(1, num + 1)
    ]


def copy_manifest(source: Path, folder: Path, steps: Iterable[int]) -> None:
    """Manifests of other steps in `folder`, made from the real one of step 1 without writing their packs."""
    text = source.read_bytes()[:-SEAL_BYTES] + b"}"
    for step in steps:
        changed = text.replace(b'"step":1,"tensors":', b'"step":%d,"tensors":' % step)
        changed = changed.replace(b"step-000000001.a", b"step-%09d.a" % step)
        seal = b',"digest":"' + hashlib.sha256(changed).hexdigest().encode() + b'"}\n'
        (folder / f"step-{step:09d}.json").write_bytes(changed[:-1] + seal)
