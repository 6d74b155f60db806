"""Policies, storage and manager of a run's checkpoints, from its settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dino_exp.checkpoint import policies
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.writers import Writers
from dino_exp.config.checkpoint_sections import CheckpointConfig
from dino_exp.config.texts import read_best
from dino_exp.dino.parts import COMPANIONS, THIN_PARTS
from dino_exp.dist.council import Council

if TYPE_CHECKING:
    from dino_exp.checkpoint.sharding.member import Member


def build_save_policy(config: CheckpointConfig) -> policies.AnyOf:
    """When to save, by the settings; an empty policy never saves."""
    save = config.save
    chosen: list[policies.SavePolicy] = []
    if save.every_epochs is not None:
        chosen.append(policies.EveryEpochs(save.every_epochs))
    if save.every_steps is not None:
        chosen.append(policies.EverySteps(save.every_steps))
    if save.every_minutes is not None:
        chosen.append(policies.EveryMinutes(save.every_minutes))
    if save.on_improvement:
        chosen.append(policies.OnImprovement())
    if config.keep.milestones:
        chosen.append(policies.AtMilestones(_milestones(config)))
    if save.at_end:
        chosen.append(policies.AtEnd())
    if save.on_signal:
        chosen.append(policies.OnSignal())
    if save.before_secs is not None:
        chosen.append(policies.BeforeDeadline(save.before_secs))
    return policies.AnyOf(tuple(chosen))


def build_keep_policy(config: CheckpointConfig) -> policies.KeepAny:
    """What to keep, by the settings: the union of last, best, every N-th epoch, milestones and pinned."""
    keep = config.keep
    if not build_save_policy(config).policies:  # who saves nothing shall not delete what earlier attempts saved
        return policies.KeepAny((policies.LatestN(sys.maxsize), policies.Pinned(), policies.Milestones(())))
    chosen: list[policies.KeepRule] = [
        policies.LatestN(sys.maxsize if keep.last is None else keep.last),
        policies.Pinned(),
    ]
    if keep.best or keep.also_best:  # the first one says what `@best` means, even when it keeps none itself
        chosen.append(policies.BestN(metric=keep.metric, mode=keep.mode, num=keep.best))
    chosen += [policies.BestN(*read_best(text)) for text in keep.also_best]
    if keep.every_epochs is not None:
        chosen.append(policies.EveryNEpochs(keep.every_epochs))
    chosen.append(policies.Milestones(_milestones(config)))  # even none: what was saved as one stays
    if keep.thin is not None:
        chosen.append(policies.ThinMilestones(THIN_PARTS[keep.thin]))
    return policies.KeepAny(tuple(chosen))


def _milestones(config: CheckpointConfig) -> tuple[policies.Milestone, ...]:
    return tuple(policies.milestone_from_text(text) for text in config.keep.milestones)


def build_manager(
    config: CheckpointConfig,
    directory: Path,
    *,
    attempt: int,
    guard: Callable[[], None],
    on_event: Callable[..., None],
    on_commit: Callable[..., None],
    writers: Writers | None = None,
) -> CheckpointManager | None:
    """The run's checkpoints; None when nothing is ever saved and nothing was. `writers`: those who write them."""
    policy = build_save_policy(config)
    if not policy.policies and not directory.exists():
        return None
    return CheckpointManager(
        directory,
        save=policy,
        keep=build_keep_policy(config),
        attempt=attempt,
        background=config.storage.background,
        max_bytes_per_sec=_bytes_per_sec(config),
        require_finite=True,
        writers=writers,
        guard=guard,
        on_event=on_event,
        on_commit=on_commit,
        max_lost_steps=config.restore.max_lost_steps,
        storage=Storage(
            codec=config.storage.codec,
            max_chain=config.storage.max_chain,
            threads=config.storage.threads,
            companions=COMPANIONS,
        ),
    )


def _bytes_per_sec(config: CheckpointConfig) -> float | None:
    return None if config.storage.max_mb_per_sec is None else config.storage.max_mb_per_sec * 1e6


def build_member(config: CheckpointConfig, directory: Path, council: Council, side: Council, *, attempt: int) -> Member:
    """What the other ranks have in place of the manager of rank 0."""
    from dino_exp.checkpoint.sharding.member import Member

    return Member(
        directory,
        council,
        side,
        save=build_save_policy(config),
        attempt=attempt,
        background=config.storage.background,
        max_bytes_per_sec=_bytes_per_sec(config),
        require_finite=True,
    )
