"""The settings of a training, one frozen dataclass for each section of `conf/`.

The values live in `conf/`; here are the names, types, bounds, roles and explanations. `docs/settings.md` is
made from this file. A field without a role is identity: changing it makes another run.
"""

from __future__ import annotations

from dataclasses import dataclass

from dino_exp.config.checkpoint_sections import CheckpointConfig
from dino_exp.config.fields import Section, setting
from dino_exp.config.image_sections import AnyAugmentConfig, AnyDataConfig
from dino_exp.config.learning_sections import (
    LABEL,
    AdamWConfig,
    EvaluationConfig,
    InitConfig,
    LarsConfig,
    LossConfig,
    ModelConfig,
    SchedulerConfig,
    SgdConfig,
    TrainConfig,
)
from dino_exp.config.rules import asked_problems, rule_problems
from dino_exp.errors import ConfigError

MAX_SEED = 2**53 - 1  # the largest whole number that JSON numbers carry exactly (RFC 8785)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Section):
    """The machine."""

    device: str = setting(role="numerics", choices=("auto", "cpu", "cuda"), help="auto: cuda if there")
    threads: int | None = setting(
        minimum=1, maximum=1024, role="numerics", help="torch threads; null: fixed at the first attempt and kept"
    )
    deterministic: bool = setting(role="numerics", help="only deterministic kernels")
    compile: bool = setting(role="numerics", legacy=False, help="compile the models' layers; pays on a GPU")
    tf32: bool = setting(role="numerics", legacy=False, help="TensorFloat-32 for products of float32 (CUDA)")
    gradient_checkpointing: bool = setting(
        role="numerics",
        legacy=False,
        help="keep only what enters a layer of the student, and compute the rest twice",
    )
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
    profile: bool = setting(
        role="runtime", legacy=False, help="record where the time of a few steps goes, in profile/ of the run"
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
    cache: str = setting(role="runtime", pattern=r".+", help="directory of what can be made again from data sets")


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
    plan: bool = setting(
        role="runtime",
        legacy=False,
        help="only say what the training would take, measured by a few steps; writes nothing",
    )
    model: ModelConfig
    init: InitConfig
    data: AnyDataConfig
    augment: AnyAugmentConfig
    loss: LossConfig
    optimizer: AdamWConfig | SgdConfig | LarsConfig
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
        problems = self._impossible()
        if problems:
            raise ConfigError("\n".join(problems))

    def _impossible(self) -> list[str]:
        return rule_problems(self)


@dataclass(frozen=True, kw_only=True)
class AskedConfig(Config):
    """What a command says that goes on from a run.

    All that it leaves out is of today's defaults and not of the run, so little is said here about what goes together:
    that is known once the run's own settings take their place (`compare.overlay`).
    """

    def _impossible(self) -> list[str]:
        return asked_problems(self)
