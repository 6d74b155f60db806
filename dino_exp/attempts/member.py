"""The training of one attempt in a rank that is not the first: the same loop, without records, files and console."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_exp import build
from dino_exp.attempts.beginning import OPTIONAL, Beginning, freeze_objects, set_generators, signals_of
from dino_exp.attempts.initial import take_weights
from dino_exp.attempts.numerics import apply_numerics
from dino_exp.attempts.preparing import preparation_along
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.sharding.member import Member
from dino_exp.config.schema import Config
from dino_exp.dist.ranks import ManyRanks
from dino_exp.errors import RefusedError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.rows import RowCount
from dino_exp.runs.signals import SignalFlags
from dino_exp.training.loop import Outcome, Training, run_training
from dino_exp.training.state import TrainState

log = logging.getLogger("dino_exp")


class Unseen:
    """Progress of a rank at which nobody looks."""

    def advance(self, step: int, images_per_sec: float) -> None:
        """A step is done."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A row was written by rank 0."""

    def saved(self, step: int, reasons: tuple[str, ...]) -> None:
        """A checkpoint was committed."""
        log.info("saved step=%d reasons=%s", step, list(reasons))


def train_along(
    ranks: ManyRanks,
    config: Config,
    directory: str,
    attempt: int,
    recorded_numerics: Mapping[str, Any],
    flags: SignalFlags,
) -> Outcome:
    """Build, restore and train to the stop, step by step with rank 0 (`Work.train`), which says what to begin with.

    Raises what the loop raises, RefusedError for other data than rank 0 has.
    """
    gc.disable()
    place = ranks.place
    device, _ = apply_numerics(config.runtime, recorded_numerics, place)
    data = build.build_data(config.data, preparation_along(config, ranks, flags))
    fingerprint = data.train.fingerprint()
    if ranks.from_first(fingerprint) != fingerprint:
        raise RefusedError(
            f"rank {place.rank} sees other data than rank 0: {fingerprint}; give all hosts the same data set"
        )
    plan = build.build_plan(config, len(data.train))
    state = build.build_state(config, data.train.channels, device)
    if ranks.from_first(False):
        take_weights(config, state)
    build.prepare_layers(config.runtime, state)
    parallel = build.spread(config, state, ranks)
    saves = ranks.from_first(False)
    folder = RunPaths(Path(directory)).checkpoints
    member = build.build_member(config.checkpoint, folder, ranks.council, ranks.connect(), attempt=attempt)
    manifest = _restore(ranks, member, state, plan.metric)
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(build.build_batches(config, data.train, state.step, place))
        set_generators(manifest, config.seed, place.rank)
        schedules = build.build_schedules(config, plan.steps_per_epoch)
        augment = build.build_augment(config)
        evaluator = None
        if config.evaluation.every_epochs is not None:
            evaluator = build.build_evaluator(config, data, augment, schedules, parallel)
        beginning = ranks.from_first(Beginning(0, None, {}))
        training = Training(
            state=state,
            batches=build.build_prefetch(batches, device),
            augment=augment,
            schedules=schedules,
            rule=build.build_rule(config, read_every=build.read_every(state)),
            plan=plan,
            evaluator=evaluator,
            rows=RowCount(beginning.num_rows),
            manager=member if saves else None,
            signals=signals_of(flags, ranks),
            progress=Unseen(),
            record={},
            guard=lambda: None,
            on_row=lambda row, best: None,
            on_trouble=lambda failure: None,
            parallel=parallel,
            latest=beginning.latest,
            begun_with=beginning.begun_with,
        )
        freeze_objects()
        return run_training(training)


def _restore(ranks: ManyRanks, member: Member, state: TrainState, metric: str) -> Manifest | None:
    """Take part in loading what rank 0 has chosen: the run's newest checkpoint, a parent's, or none."""
    resumes = ranks.from_first(False)
    forks = not resumes and ranks.from_first(False)
    if not resumes and not forks:
        return None
    restored = member.restore(state, optional=OPTIONAL, is_own=resumes)
    if forks:
        state.begin_as_fork(metric, ranks.from_first({}))
    return None if restored is None else restored.manifest
