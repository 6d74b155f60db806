"""Settings of what is learned and how: model, loss, optimizer, schedules, horizon."""

from __future__ import annotations

from dataclasses import dataclass

from dino_exp.config.fields import Section, setting

LABEL = r"[A-Za-z0-9._]+"  # no "-", which separates the parts of a run key


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The vision transformer; image and patch size come from `data`."""

    name: str = setting(role="runtime", pattern=LABEL, help="label; the first part of the run key")
    embed_dim: int = setting(minimum=1, help="width of a token")
    depth: int = setting(minimum=1, help="number of blocks")
    num_heads: int = setting(minimum=1, help="attention heads; divides embed_dim")
    mlp_ratio: float = setting(above=0, help="hidden width of a block's MLP over embed_dim")
    drop_path_rate: float = setting(
        minimum=0, maximum=0.99, help="stochastic depth of the student's last block, rising linearly from 0"
    )


@dataclass(frozen=True, kw_only=True)
class InitConfig(Section):
    """Initial weights."""

    scheme: str = setting(
        choices=("official", "fan_in"),
        help="official: truncated normal 0.02; fan_in: 1/sqrt(fan_in), smaller with depth, learns in few steps",
    )
    weights: str | None = setting(
        role="runtime", legacy=None, help="begin with the weights of this file: .safetensors, or .pth of official DINO"
    )
    weights_digest: str | None = setting(
        legacy=None, pattern=r"sha256:[0-9a-f]{64}", help="digest of that file; set by init.weights="
    )


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """The projection head and the loss."""

    name: str = setting(role="runtime", pattern=LABEL, help="label")
    out_dim: int = setting(minimum=2, help="prototypes K")
    hidden_dim: int = setting(minimum=1, help="width of the head's MLP")
    bottleneck_dim: int = setting(minimum=1, help="width before the prototypes")
    num_layers: int = setting(minimum=1, help="linear layers of the head before the prototypes")
    use_bn: bool = setting(help="batch norm in the head; keeps short trainings on small data from collapsing")
    norm_last_layer: bool = setting(help="prototypes of fixed length")
    student_temp: float = setting(above=0, help="student temperature")
    teacher_temp: float = setting(above=0, help="teacher temperature after warm-up; above 0.07 it may collapse")
    warmup_teacher_temp: float = setting(above=0, help="teacher temperature at the start")
    warmup_teacher_temp_epochs: int = setting(minimum=0, help="epochs from the one to the other, linearly")
    center_momentum: float = setting(minimum=0, maximum=1, help="moving average of the centre")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """What all optimizers have."""

    name: str = setting(choices=("adamw", "sgd", "lars"), help="which optimizer")
    lr: float = setting(above=0, help="peak learning rate")
    scale_lr_to_batch: int | None = setting(
        minimum=1, help="when set, the peak is lr * train.batch_size / this (the paper's rule: 256)"
    )
    scale_lr_to_width: int | None = setting(
        minimum=1, legacy=None, help="when set, the peak is multiplied by sqrt(this / model.embed_dim)"
    )
    weight_decay: float = setting(minimum=0, help="weight decay at the start; none for biases and norms")
    weight_decay_end: float = setting(minimum=0, help="weight decay at the end")
    clip_grad: float | None = setting(above=0, help="largest gradient norm of each parameter tensor")
    freeze_last_layer_epochs: int = setting(minimum=0, help="epochs in which the prototypes stand still")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019)."""

    name: str = setting(choices=("adamw",), help="which optimizer")
    betas: tuple[float, float] = setting(minimum=0, maximum=0.999999, help="decay of the two moments")
    eps: float = setting(above=0, help="added to the root of the second moment")


@dataclass(frozen=True, kw_only=True)
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    name: str = setting(choices=("sgd",), help="which optimizer")
    momentum: float = setting(minimum=0, maximum=0.999999, help="momentum")


@dataclass(frozen=True, kw_only=True)
class LarsConfig(OptimizerConfig):
    """Momentum with a learning rate for each layer (You et al. 2017), for very large batches."""

    name: str = setting(choices=("lars",), help="which optimizer")
    momentum: float = setting(minimum=0, maximum=0.999999, help="momentum")
    eta: float = setting(above=0, help="trust coefficient: length of an update over that of its parameter, at lr 1")


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Section):
    """How learning rate, weight decay and the teacher's momentum and temperature go over the horizon."""

    name: str = setting(choices=("cosine", "constant"), help="constant: only the warm-ups apply")
    warmup_epochs: int = setting(minimum=0, help="epochs in which the learning rate rises from 0")
    min_lr: float = setting(minimum=0, help="learning rate at the end (cosine)")
    teacher_momentum: float = setting(minimum=0, maximum=1, help="share of the teacher that a step keeps")
    teacher_momentum_end: float = setting(minimum=0, maximum=1, help="the same, at the end (cosine)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The horizon, the batch, and where to stop before the horizon."""

    epochs: int = setting(minimum=1, help="horizon: where the schedules end")
    batch_size: int = setting(minimum=1, help="images of a step, over all devices")
    stop_after_steps: int | None = setting(minimum=1, role="budget", help="stop at this step of the run")
    stop_after_epochs: int | None = setting(minimum=1, role="budget", help="stop after this epoch of the run")
    accumulate: int = setting(
        minimum=1, legacy=1, help="parts in which each process takes its share of a batch, for small memories"
    )
    precision: str = setting(
        choices=("fp32", "bf16", "fp16"), help="numbers of forward and backward pass; fp16 scales the loss"
    )
    on_collapse: str = setting(role="runtime", choices=("stop", "warn"), help="when the model collapses")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """The evaluation during training: k-NN, and the loss on held-out images."""

    every_epochs: int | None = setting(minimum=1, role="budget", help="after every N epochs; null: never")
    batch_size: int = setting(minimum=1, role="numerics", help="images of a forward pass in evaluation")
    train_images: int | None = setting(
        minimum=20, role="budget", legacy=None, help="training images that k-NN compares with, evenly spread; null: all"
    )
    val_images: int | None = setting(
        minimum=1, role="budget", legacy=None, help="held-out images that are measured, evenly spread; null: all"
    )
