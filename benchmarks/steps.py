"""A training step of DINO, ours and that of the official code, on the same weights and the same crops.

Shapes: B images, V crops of each (two global first), K prototypes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from benchmarks.official import Official
from dino_exp import build
from dino_exp.attempts.numerics import apply_numerics
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.config.schema import Config
from dino_exp.data.images import Images
from dino_exp.data.loader import Batch
from dino_exp.dino.scaling import HALF
from dino_exp.training.step import train_step
from dino_exp.training.verdict import settle

GLOBAL_SIZE, LOCAL_SIZE, NUM_LOCAL, PROTOTYPES = 224, 96, 8, 65536
NUM_STEPS = 200  # of the schedules: more than any measurement takes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """ViT-S/16 with the code's defaults, but for what is given here."""

    batch: int
    precision: str = "fp32"
    device: str = "cpu"
    drop_path: float = 0.1
    words: tuple[str, ...] = ()  # more settings of ours

    def config(self) -> Config:
        """Our settings."""
        return config_from_mapping(
            compose(
                [
                    "experiment=digits",
                    "model=vit_s",
                    "data=synthetic",
                    "augment=dino",
                    "loss=dino",
                    "init.scheme=official",
                    f"data.image_size={GLOBAL_SIZE}",
                    f"data.local_size={LOCAL_SIZE}",
                    "data.patch_size=16",
                    f"data.num_samples={max(self.batch * NUM_STEPS, 64)}",
                    f"train.batch_size={self.batch}",
                    f"train.precision={self.precision}",
                    "train.epochs=1",
                    f"model.drop_path_rate={self.drop_path}",
                    "scheduler.warmup_epochs=0",
                    "optimizer.lr=1e-4",
                    "optimizer.scale_lr_to_width=null",
                    "optimizer.weight_decay_end=0.4",
                    "scheduler.min_lr=1e-6",
                    "scheduler.teacher_momentum=0.996",
                    "evaluation.every_epochs=null",
                    f"runtime.device={self.device}",
                    *self.words,
                ]
            )
        )


def crops_of(recipe: Recipe, seed: int = 0) -> list[Tensor]:
    """Noise in the shapes of the crops, normalised."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * NUM_LOCAL
    return [torch.randn(recipe.batch, 3, size, size, generator=generator).to(recipe.device) for size in sizes]


class Ours:
    """Our step, as the loop calls it, on crops that are there already."""

    def __init__(self, recipe: Recipe, read_every: int | None = None) -> None:
        config = recipe.config()
        self.device, _ = apply_numerics(config.runtime, {"threads": torch.get_num_threads()})
        self.state = build.build_state(config, 3, self.device)
        build.prepare_layers(config.runtime, self.state)
        self.rule = build.build_rule(config, read_every=read_every or build.read_every(self.state))
        self.schedules = build.build_schedules(config, NUM_STEPS)
        self.batch = recipe.batch

    def load(self, official: OfficialStep) -> None:
        """Begin with the weights of the official models, whose names are ours."""
        self.state.student.load_state_dict(official.student.state_dict())
        self.state.teacher.load_state_dict(official.teacher.state_dict())

    def step(self, crops: Sequence[Tensor]) -> float | None:
        """One step; its loss where the host has asked for it."""
        number = self.state.step + 1
        black = Images.whole(torch.zeros(self.batch, 3, 1, 1, dtype=torch.uint8))
        batch = Batch(step=number, epoch=0, sample_ids_B=torch.arange(self.batch), images=black)
        augment = lambda *_: list(crops)  # noqa: E731
        return train_step(self.state, batch, augment=augment, schedules=self.schedules, rule=self.rule).loss

    def wait(self) -> None:
        """Until the device has done all of it."""
        settle(self.state)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class OfficialStep:
    """What `train_one_epoch` of the official code does with a batch, on the device that is asked for.

    It moves crops to CUDA and scales by its own table; without CUDA neither can be called, so the lines of its loop are
    repeated here, with its own modules, loss, clipping, freezing and schedules.
    """

    def __init__(self, official: Official, recipe: Recipe) -> None:
        if not torch.distributed.is_initialized():  # its loss adds over ranks
            backend, store = ("nccl" if recipe.device == "cuda" else "gloo"), torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        utils, vits = official.utils, official.vision_transformer
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the weight norm that it uses
            head: Any = vits.DINOHead(384, PROTOTYPES, use_bn=False, norm_last_layer=True)
            teacher_head: Any = vits.DINOHead(384, PROTOTYPES, False)
        self.student = utils.MultiCropWrapper(vits.vit_small(16, drop_path_rate=recipe.drop_path), head)
        self.teacher = utils.MultiCropWrapper(vits.vit_small(16), teacher_head)
        self.teacher.load_state_dict(self.student.state_dict())
        for model in (self.student, self.teacher):
            model.to(recipe.device)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False
        self.loss = official.main_dino.DINOLoss(PROTOTYPES, 2 + NUM_LOCAL, 0.04, 0.04, 0, 1).to(recipe.device)
        self.optimizer = torch.optim.AdamW(utils.get_params_groups(self.student))
        self.lr = utils.cosine_scheduler(1e-4, 1e-6, 1, NUM_STEPS)
        self.decay = utils.cosine_scheduler(0.04, 0.4, 1, NUM_STEPS)
        self.momentum = utils.cosine_scheduler(0.996, 1, 1, NUM_STEPS)
        self.utils, self.recipe, self.number = utils, recipe, 0

    def step(self, crops: Sequence[Tensor]) -> float:
        """One step and its loss."""
        for place, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr[self.number]
            if place == 0:
                group["weight_decay"] = self.decay[self.number]
        half = HALF.get(self.recipe.precision)
        with nullcontext() if half is None else torch.autocast(self.recipe.device, dtype=half):
            teacher_output = self.teacher(list(crops[:2]))
            student_output = self.student(list(crops))
            loss = self.loss(student_output, teacher_output, 0)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the official loss is {value}")
        self.optimizer.zero_grad()
        loss.backward()
        self.utils.clip_gradients(self.student, 3.0)
        self.utils.cancel_gradients_last_layer(0, self.student, 0)
        self.optimizer.step()
        with torch.no_grad():
            momentum = self.momentum[self.number]
            for ours, theirs in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                theirs.data.mul_(momentum).add_((1 - momentum) * ours.detach().data)
        self.number += 1
        return value

    def wait(self) -> None:
        """Until the device has done all of it."""
        if self.recipe.device == "cuda":
            torch.cuda.synchronize()
