"""Models, optimizer, schedules and the parts of the loop, from the settings."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from typing import Any, cast

import torch

from dino_exp.build.images import Data
from dino_exp.config.learning_sections import AdamWConfig, LarsConfig, OptimizerConfig, SgdConfig
from dino_exp.config.schema import Config, RuntimeConfig
from dino_exp.data.augment_digits import DigitsAugment
from dino_exp.data.augment_dino import DinoAugment
from dino_exp.data.order import steps_per_epoch
from dino_exp.dino.costs import Dimensions
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.dino.optim import build_optimizer
from dino_exp.dino.scaling import LossScaler
from dino_exp.dino.schedules import ScheduleName, Schedules
from dino_exp.dist.ranks import Ranks
from dino_exp.errors import ConfigError
from dino_exp.evaluation.panel import Panel
from dino_exp.models.head import DINOHead
from dino_exp.models.init import Scheme, materialise
from dino_exp.models.vit import VisionTransformer
from dino_exp.training import parallel
from dino_exp.training.evaluator import Evaluator
from dino_exp.training.parallel import Parallel
from dino_exp.training.plan import TrainingPlan, plan_stop
from dino_exp.training.state import TrainState
from dino_exp.training.step import StepRule

_BYTES_PER_PARAMETER = 20  # student, teacher, two moments and gradients, in float32
_MOST_SHAPES = 64  # of tokens in a row, with and without gradients: a step has eight at most
_SHARE_OF_DEVICE = 0.5  # the other half is for activations


def build_plan(config: Config, num_images: int) -> TrainingPlan:
    """The calendar of the run over `num_images` training images. Raises ConfigError for a batch larger than these."""
    per_epoch = steps_per_epoch(num_images, config.train.batch_size)
    horizon = config.train.epochs * per_epoch
    return TrainingPlan(
        steps_per_epoch=per_epoch,
        horizon_steps=horizon,
        stop_step=plan_stop(
            horizon_steps=horizon,
            steps_per_epoch=per_epoch,
            stop_after_steps=config.train.stop_after_steps,
            stop_after_epochs=config.train.stop_after_epochs,
        ),
        log_every_steps=config.logger.every_steps,
        evaluate_every_epochs=config.evaluation.every_epochs,
        batch_size=config.train.batch_size,
        warmup_steps=config.scheduler.warmup_epochs * per_epoch,
        metric=config.checkpoint.keep.metric,
        mode=config.checkpoint.keep.mode,
        on_collapse=config.train.on_collapse,
    )


def build_schedules(config: Config, per_epoch: int) -> Schedules:
    """The schedules of the whole run."""
    optimizer, scheduler, loss = config.optimizer, config.scheduler, config.loss
    return Schedules(
        name=cast(ScheduleName, scheduler.name),
        num_epochs=config.train.epochs,
        steps_per_epoch=per_epoch,
        lr=peak_lr(config),
        min_lr=scheduler.min_lr,
        warmup_epochs=scheduler.warmup_epochs,
        weight_decay=optimizer.weight_decay,
        weight_decay_end=optimizer.weight_decay_end,
        teacher_momentum=scheduler.teacher_momentum,
        teacher_momentum_end=scheduler.teacher_momentum_end,
        teacher_temp=loss.teacher_temp,
        warmup_teacher_temp=loss.warmup_teacher_temp,
        warmup_teacher_temp_epochs=loss.warmup_teacher_temp_epochs,
        freeze_last_layer_epochs=optimizer.freeze_last_layer_epochs,
    )


def peak_lr(config: Config) -> float:
    """`optimizer.lr` scaled to the batch (the paper's linear rule) and to the model's width, where settings say so.

    The rule of the width is our own measurement (docs/decisions/0008).
    """
    optimizer = config.optimizer
    scale = 1.0
    if optimizer.scale_lr_to_batch is not None:
        scale *= config.train.batch_size / optimizer.scale_lr_to_batch
    if optimizer.scale_lr_to_width is not None:
        scale *= math.sqrt(optimizer.scale_lr_to_width / config.model.embed_dim)
    return optimizer.lr * scale


def build_student(config: Config, channels: int) -> MultiCropModel:
    """Backbone and head with the initial weights of the seed."""
    make = partial(build_modules, config, channels)
    return materialise(make, seed=config.seed, scheme=cast(Scheme, config.init.scheme))


def prepare_layers(runtime: RuntimeConfig, state: TrainState) -> None:
    """Compile the layers, and let the student compute activations twice, where the settings ask for it.

    Raises ConfigError where there is nothing to compile with.
    """
    student, teacher = state.student.backbone, state.teacher.backbone
    assert isinstance(student, VisionTransformer)
    assert isinstance(teacher, VisionTransformer)
    student.gradient_checkpointing = runtime.gradient_checkpointing
    if not runtime.compile:
        return
    if state.center_1K.device.type == "cpu":
        _require_compiler()
    # All layers share one limit, beyond which torch goes on without compiling, and so with other bits: for which shapes
    # would depend on those that the process has met before.
    torch._dynamo.config.recompile_limit = _MOST_SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Or it times kernels and takes the faster one, which need not add in the same order in the next process.
    torch._inductor.config.deterministic = runtime.deterministic
    # Its advice to use TF32 is given where runtime.tf32=false says not to.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    for block in (*student.blocks, *teacher.blocks):
        block.compile(dynamic=False)


def _require_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as missing:
        raise ConfigError(
            "runtime.compile=true on a CPU needs a C++ compiler, and none is found (g++, clang++, CXX): install one, "
            "or use runtime.compile=false"
        ) from missing


def build_modules(config: Config, channels: int) -> MultiCropModel:
    """Backbone and head without meaningful values."""
    model, data, loss = config.model, config.data, config.loss
    backbone = VisionTransformer(
        image_size=data.image_size,
        patch_size=data.patch_size,
        in_channels=channels,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
    )
    head = DINOHead(
        in_dim=model.embed_dim,
        out_dim=loss.out_dim,
        hidden_dim=loss.hidden_dim,
        bottleneck_dim=loss.bottleneck_dim,
        num_layers=loss.num_layers,
        use_bn=loss.use_bn,
        norm_last_layer=loss.norm_last_layer,
    )
    return MultiCropModel(backbone, head)


def build_dimensions(config: Config, channels: int) -> Dimensions:
    """What the costs of a step are computed from."""
    model, data, loss = config.model, config.data, config.loss
    return Dimensions(
        channels=channels,
        patch_size=data.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_dim=int(model.embed_dim * model.mlp_ratio),
        head_widths=(model.embed_dim, *[loss.hidden_dim] * (loss.num_layers - 1), loss.bottleneck_dim),
        head_norms=loss.use_bn,
        num_prototypes=loss.out_dim,
        global_size=data.image_size,
        local_size=data.local_size,
        num_local=config.augment.num_local_crops,
    )


def build_state(config: Config, channels: int, device: torch.device) -> TrainState:
    """The state before the first step: the teacher is a copy of the student, the centre is zero."""
    student = build_student(config, channels).to(device)
    teacher = copy.deepcopy(student)
    teacher.requires_grad_(False)
    center = torch.zeros(1, config.loss.out_dim, device=device)
    scaler = LossScaler(device) if config.train.precision == "fp16" else None
    return TrainState(student, teacher, _build_optimizer(config.optimizer, student), center, scaler=scaler)


def spread(config: Config, state: TrainState, ranks: Ranks) -> Parallel:
    """Lay a state that is whole on every rank over the ranks, as `runtime.parallel` says.

    Raises ConfigError for a batch that leaves a rank without an image.
    """
    place, train = ranks.place, config.train
    if place.size == 1:
        return parallel.ALONE
    least = place.size * train.accumulate
    if train.batch_size < least:
        parts = f" in {train.accumulate} parts each" if train.accumulate > 1 else ""
        raise ConfigError(
            f"train.batch_size={train.batch_size} on {place.size} processes{parts}: expected at least {least}, an "
            "image for each; start fewer processes"
        )
    if parallel_name(config.runtime.parallel, state) == "ddp":
        return parallel.Replicated(state.student, state.teacher, ranks)
    from dino_exp.training.sharded import Sharded  # FSDP takes a while to import

    spread_out = Sharded(state.student, state.teacher, ranks, precision=train.precision)
    state.optimizer = _build_optimizer(config.optimizer, state.student, spread_out)
    return spread_out


def parallel_name(asked: str, state: TrainState) -> str:
    """How models lie over several ranks: whole on each, unless asked otherwise or too large for the device."""
    if asked != "auto":
        return asked
    device = state.center_1K.device
    if device.type != "cuda":
        return "ddp"
    needed = _BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in state.student.parameters())
    return "fsdp" if needed > _SHARE_OF_DEVICE * torch.cuda.get_device_properties(device).total_memory else "ddp"


def _build_optimizer(
    config: OptimizerConfig, student: MultiCropModel, sharded: Parallel | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a student that is whole, or that `sharded` has cut into shares."""
    if isinstance(config, SgdConfig):
        return build_optimizer("sgd", student, momentum=config.momentum)
    if isinstance(config, LarsConfig):
        shares: dict[str, Any] = {}
        if sharded is not None:
            shares = {"whole_norms": sharded.whole_norms, "local_part": parallel.local_part}
        return build_optimizer("lars", student, momentum=config.momentum, eta=config.eta, **shares)
    assert isinstance(config, AdamWConfig)
    return build_optimizer("adamw", student, betas=config.betas, eps=config.eps)


READ_EVERY = 20  # steps that a device may be ahead of the host


def read_every(state: TrainState) -> int:
    """How many steps the host may leave unread: some, where a device is ahead of it and its optimizer can skip one."""
    return READ_EVERY if state.center_1K.is_cuda and state.optimizer.defaults.get("fused") else 1


def build_rule(config: Config, *, read_every: int = 1) -> StepRule:
    """The constants of a step."""
    return StepRule(
        seed=config.seed,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        student_temp=config.loss.student_temp,
        center_momentum=config.loss.center_momentum,
        drop_path_rate=config.model.drop_path_rate,
        depth=config.model.depth,
        clip_grad=config.optimizer.clip_grad,
        precision=config.train.precision,
        read_every=read_every,
    )


def build_evaluator(
    config: Config,
    data: Data,
    augment: DigitsAugment | DinoAugment,
    schedules: Schedules,
    spread_out: Parallel = parallel.ALONE,
) -> Evaluator:
    """Evaluation during training; not needed where `evaluation.every_epochs` is null.

    Raises ConfigError for data on which nothing can be measured.
    """
    return Evaluator(
        panel=Panel(
            train_set=data.train,
            val_set=data.val,
            train_images=config.evaluation.train_images,
            val_images=config.evaluation.val_images,
        ),
        augment=augment,
        clean=augment.clean,
        schedules=schedules,
        rule=build_rule(config),
        seed=config.seed,
        batch_size=config.evaluation.batch_size,
        parallel=spread_out,
        compiled=config.runtime.compile,
    )
