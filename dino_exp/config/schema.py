"""The settings of a training, one frozen dataclass for each section of `conf/`.

The values live in `conf/`; here are the names, types, bounds, roles and explanations. `docs/settings.md` is
made from this file. A field without a role is identity: changing it makes another run.
"""

from __future__ import annotations

from dataclasses import dataclass

from dino_exp.config.fields import Section, setting
from dino_exp.config.rules import rule_problems
from dino_exp.config.texts import METRICS, MODES
from dino_exp.errors import ConfigError

LABEL = r"[A-Za-z0-9._]+"  # no "-", which separates the parts of a run key
MAX_SEED = 2**53 - 1  # the largest whole number that JSON numbers carry exactly (RFC 8785)


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
class DataConfig(Section):
    """The data set and the sizes of its crops."""

    name: str = setting(choices=("digits", "synthetic"), help="digits: scikit-learn's; synthetic: made, colour")
    image_size: int = setting(minimum=1, help="side of a global crop, pixels")
    local_size: int = setting(minimum=1, help="side of a local crop, pixels")
    patch_size: int = setting(minimum=1, help="side of a patch, pixels; divides both crop sizes")
    num_samples: int | None = setting(minimum=1, help="training images to make (synthetic only)")
    num_classes: int | None = setting(minimum=2, help="classes to make (synthetic only)")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    """What both augmentations have: the crops."""

    name: str = setting(choices=("digits", "dino"), help="which augmentation")
    num_local_crops: int = setting(minimum=0, help="local crops of an image, beside its two global ones")
    global_area: tuple[float, float] = setting(
        above=0, maximum=1, increasing=True, help="area of a global crop, share of the image"
    )
    local_area: tuple[float, float] = setting(
        above=0, maximum=1, increasing=True, help="area of a local crop, share of the image"
    )
    ratio: tuple[float, float] = setting(above=0, increasing=True, help="width over height of a crop")


@dataclass(frozen=True, kw_only=True)
class DigitsAugmentConfig(AugmentConfig):
    """Gentle distortions for digits: never flipped."""

    name: str = setting(choices=("digits",), help="which augmentation")
    max_rotation_degrees: float = setting(minimum=0, maximum=180, help="rotation either way, degrees")
    blur_probability: float = setting(minimum=0, maximum=1, help="share of crops that are blurred")
    max_gain: float = setting(minimum=0, maximum=1, help="contrast change either way, share")
    noise_std: float = setting(minimum=0, help="Gaussian noise, in units of full ink")


@dataclass(frozen=True, kw_only=True)
class DinoAugmentConfig(AugmentConfig):
    """The paper's augmentation (Caron et al. 2021, after BYOL); needs colour images."""

    name: str = setting(choices=("dino",), help="which augmentation")
    flip_probability: float = setting(minimum=0, maximum=1, help="horizontal flip")
    jitter_probability: float = setting(minimum=0, maximum=1, help="colour jitter")
    brightness: float = setting(minimum=0, help="jitter strength")
    contrast: float = setting(minimum=0, help="jitter strength")
    saturation: float = setting(minimum=0, help="jitter strength")
    hue: float = setting(minimum=0, maximum=0.5, help="jitter strength, turns of the colour circle")
    grey_probability: float = setting(minimum=0, maximum=1, help="conversion to grey")
    blur_probabilities: tuple[float, float, float] = setting(
        minimum=0, maximum=1, help="Gaussian blur of the first global, second global and local crops"
    )
    blur_radius: tuple[float, float] = setting(above=0, increasing=True, help="standard deviation, pixels")
    solarise_probability: float = setting(minimum=0, maximum=1, help="solarisation of the second global crop")


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
    """What both optimizers have."""

    name: str = setting(choices=("adamw", "sgd"), help="which optimizer")
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
    precision: str = setting(choices=("fp32", "bf16"), help="numbers of the forward and backward pass")
    on_collapse: str = setting(role="runtime", choices=("stop", "warn"), help="when the model collapses")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """The k-NN evaluation during training."""

    every_epochs: int | None = setting(minimum=1, role="budget", help="after every N epochs; null: never")
    batch_size: int = setting(minimum=1, role="numerics", help="images of a forward pass in evaluation")


@dataclass(frozen=True, kw_only=True)
class SaveConfig(Section):
    """When to save a checkpoint: when any of these holds."""

    every_epochs: int | None = setting(minimum=1, role="runtime", help="after every N epochs")
    every_steps: int | None = setting(minimum=1, role="runtime", help="after every N steps")
    every_minutes: float | None = setting(above=0, role="runtime", help="after M minutes without a save")
    on_improvement: bool = setting(role="runtime", help="when keep.metric improved")
    at_end: bool = setting(role="runtime", help="where the training stops or ends")
    on_signal: bool = setting(role="runtime", help="at TERM, INT, USR1 and USR2")
    before_secs: float | None = setting(
        above=0, role="runtime", legacy=None, help="so long before the end of a time allocation, once"
    )
    deadline: str | None = setting(
        role="runtime",
        legacy=None,
        help="that end, such as 2026-11-24T18:00:00+01:00; null, or once it has passed: SLURM's end time, if any",
    )


@dataclass(frozen=True, kw_only=True)
class KeepConfig(Section):
    """What to keep: the union of these. The newest checkpoint is always kept."""

    last: int | None = setting(minimum=1, role="runtime", help="the last K; null: all")
    best: int = setting(minimum=0, role="runtime", help="the best B by metric")
    metric: str = setting(
        role="runtime",
        choices=METRICS,
        help="what best means; measured at evaluations",
    )
    mode: str = setting(role="runtime", choices=MODES, help="whether more or less is better")
    also_best: tuple[str, ...] = setting(
        role="runtime", legacy=(), help='the best N by other metrics, as "metric:mode:N", such as "val_loss:min:1"'
    )
    every_epochs: int | None = setting(
        minimum=1, role="runtime", legacy=None, help="those at the end of every N-th epoch"
    )
    milestones: tuple[str, ...] = setting(
        role="runtime",
        pattern=r"(100|[1-9][0-9]?(\.[0-9]+)?)%|[1-9][0-9]{0,8}",
        help='kept for ever: "25%" of the horizon, or an epoch',
    )
    thin: str | None = setting(
        role="runtime",
        legacy=None,
        choices=("teacher", "models"),
        help="all that stays of milestones which nothing else keeps; models: teacher and student; null: everything",
    )


@dataclass(frozen=True, kw_only=True)
class StorageConfig(Section):
    """How checkpoints are written."""

    codec: str = setting(
        role="runtime",
        choices=("raw", "zstd", "delta"),
        help="raw: ordinary safetensors files; zstd: compressed; delta: what changed since the one before",
    )
    max_chain: int = setting(
        role="runtime", minimum=1, maximum=20, legacy=5, help="earlier checkpoints that one may need (delta)"
    )
    threads: int = setting(
        role="runtime", minimum=0, maximum=256, legacy=0, help="threads that encode, beside the one that writes"
    )
    background: bool = setting(
        role="runtime", legacy=True, help="write a copy of the state beside the training; false: training waits"
    )
    max_mb_per_sec: float | None = setting(
        above=0, role="runtime", legacy=None, help="limit of writing in the background, megabytes a second"
    )


@dataclass(frozen=True, kw_only=True)
class RestoreConfig(Section):
    """What a resume may put up with."""

    max_lost_steps: int | None = setting(
        minimum=0, role="runtime", help="stop when damaged checkpoints would cost more steps; null: no limit"
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Saving, keeping, storing and restoring checkpoints."""

    name: str = setting(role="runtime", pattern=LABEL, help="label")
    save: SaveConfig
    keep: KeepConfig
    storage: StorageConfig
    restore: RestoreConfig


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """The machine."""

    device: str = setting(role="numerics", choices=("auto", "cpu", "cuda"), help="auto: cuda if there")
    threads: int | None = setting(
        minimum=1, maximum=1024, role="numerics", help="torch threads; null: fixed at the first attempt and kept"
    )
    deterministic: bool = setting(role="numerics", help="only deterministic kernels")
    workers: int = setting(minimum=0, role="runtime", help="processes that load data; 0: none")
    lock_wait_secs: float = setting(minimum=0, role="runtime", help="wait for a run in other hands")
    parallel: str = setting(
        role="numerics",
        legacy="auto",
        choices=("auto", "ddp", "fsdp"),
        help="of several processes: ddp: the whole model on each; fsdp: cut into shares; auto: what fits the device",
    )
    timeout_secs: float = setting(
        above=0, role="runtime", legacy=600.0, help="how long one process waits for another before it gives up"
    )


@dataclass(frozen=True, kw_only=True)
class LoggerConfig(Section):
    """Rows of metrics.jsonl, which are always written, the console, and trackers; several choices: `logger=[a,b]`."""

    every_steps: int = setting(minimum=1, role="budget", help="a row after every N steps")
    console: str = setting(role="runtime", choices=("auto", "plain", "rich"), help="auto: rich on a terminal")
    report: bool = setting(
        role="runtime", legacy=False, help="write report.html at evaluations and at the end, beside the training"
    )
    tensorboard: bool = setting(role="runtime", legacy=False, help="write the rows for TensorBoard too")
    histogram_every_epochs: int | None = setting(
        minimum=1, role="runtime", legacy=None, help="histograms of the student's weights (TensorBoard); null: none"
    )
    wandb: str | None = setting(
        role="runtime",
        legacy=None,
        choices=("online", "offline"),
        help="send the rows to Weights & Biases, or keep them for `wandb sync`; null: neither",
    )
    wandb_project: str = setting(
        role="runtime", legacy="dino_exp", pattern=r"[^/\\#?%:\s][^/\\#?%:]{0,127}", help="its project there"
    )
    wandb_entity: str | None = setting(
        role="runtime", legacy=None, pattern=r"[^/\\#?%:\s]{1,128}", help="team or user there; null: that of the key"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """What distinguishes a run, and how strict its continuation is."""

    variant: str | None = setting(role="runtime", pattern=LABEL, help="last part of the run key")
    tags: tuple[str, ...] = setting(role="runtime", help="words to find the run by")
    note: str | None = setting(role="runtime", help="a sentence for the record")
    on_code_change: str = setting(role="runtime", choices=("warn", "refuse"), help="resuming with other code")
    on_data_change: str = setting(role="runtime", choices=("refuse", "warn"), help="resuming on other data")


@dataclass(frozen=True, kw_only=True)
class PathsConfig(Section):
    """Where things lie; never taken from a run."""

    outputs: str = setting(role="runtime", pattern=r".+", help="directory of runs and catalogue")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Section):
    """Of `--multirun`; never taken from a run."""

    name: str | None = setting(
        role="runtime", pattern=r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", help="of its record; null: from the overrides"
    )
    dry_run: bool = setting(role="runtime", help="print the plan and do nothing")


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """All settings of a training; cannot exist with an impossible combination."""

    seed: int = setting(minimum=0, maximum=MAX_SEED, help="of all randomness; left out of the group hash")
    resume: str | None = setting(role="runtime", help="run to continue: directory, key prefix, or last")
    fork: str | None = setting(role="runtime", help="start a new run from run[@best|@latest|@step]")
    origin: str | None = setting(
        legacy=None, pattern=r"s1:[0-9a-f]{64}", help="digest of the state that a fork began with; set by fork="
    )
    model: ModelConfig
    init: InitConfig
    data: DataConfig
    augment: DigitsAugmentConfig | DinoAugmentConfig
    loss: LossConfig
    optimizer: AdamWConfig | SgdConfig
    scheduler: SchedulerConfig
    train: TrainConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig
    runtime: RuntimeConfig
    logger: LoggerConfig
    run: RunConfig
    paths: PathsConfig
    sweep: SweepConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = rule_problems(self)
        if problems:
            raise ConfigError("\n".join(problems))
