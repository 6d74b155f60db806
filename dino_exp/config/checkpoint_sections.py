"""Settings of checkpoints: when to save, what to keep, how to store and restore."""

from __future__ import annotations

from dataclasses import dataclass

from dino_exp.config.fields import Section, setting
from dino_exp.config.learning_sections import LABEL
from dino_exp.config.texts import METRICS, MODES


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
        pattern=r"(?!0+(\.0+)?%)(100(\.0{1,9})?|[1-9]?[0-9](\.[0-9]{1,9})?)%|[1-9][0-9]{0,8}",
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
