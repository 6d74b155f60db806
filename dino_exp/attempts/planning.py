"""`plan=true`: what a training would take, from formulas and a few real steps. Nothing is written and no lock is taken.

Imports torch; the text is made in `plan_text`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dino_exp import build
from dino_exp.attempts.fork import parent_checkpoints
from dino_exp.attempts.numerics import apply_numerics
from dino_exp.attempts.target import Target
from dino_exp.build import Data
from dino_exp.checkpoint.policies.forecast import Kept, Span, most_kept, num_saves
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.schema import Config
from dino_exp.dino.costs import (
    FLOAT,
    MOMENTS,
    Arithmetic,
    Dimensions,
    StepMemory,
    backbone_flops,
    forward_flops,
    step_flops,
    step_memory,
)
from dino_exp.dino.parts import THIN_PARTS
from dino_exp.evaluation.features import Interrupted
from dino_exp.fsio import LOCAL
from dino_exp.runs.deadline import deadline_secs
from dino_exp.runs.memory import available_bytes
from dino_exp.training.evaluator import Evaluator
from dino_exp.training.pace import Pace, measure_pace
from dino_exp.training.plan import TrainingPlan
from dino_exp.training.state import TrainState
from dino_exp.training.step import train_step
from dino_exp.training.verdict import NonFiniteError

log = logging.getLogger("dino_exp")

_AHEAD = 2  # batches that each worker has ready when measuring begins
_EVALUATION_SECS = 15.0  # after which an evaluation is broken off


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers the model learns, and has."""

    backbone: int
    head: int
    trained: int

    @property
    def all(self) -> int:
        """Of one model."""
        return self.backbone + self.head


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Saves to come, what is kept of them at most, bytes of a whole and of a thinned one, and what the disk has."""

    saves: int
    kept: Kept
    present: int
    each_bytes: int
    thin_bytes: int
    free_bytes: int

    @property
    def most_bytes(self) -> int:
        """At once on the disk: an old one goes only when a new one is there."""
        return (self.kept.whole + min(self.saves, 1)) * self.each_bytes + self.kept.thin * self.thin_bytes

    @property
    def needed_bytes(self) -> int:
        """What must still be free now."""
        return max(self.most_bytes - self.present * self.each_bytes, 0)


@dataclass(frozen=True, kw_only=True)
class CacheToMake:
    """A cache of decoded images that is not there yet: about how large, and what its disk has."""

    num_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """All that a plan says.

    `pace` is None where nothing was measured, and `unmeasured` says why; `evaluation_secs` also where it took too long.
    With a `cache` to make, the pace is that of decoding.
    """

    device: torch.device
    threads: int
    num_images: int
    start_step: int
    plan: TrainingPlan
    dims: Dimensions
    step_flops: int
    parameters: Parameters
    memory: StepMemory
    at_once: int
    device_bytes: int | None
    snapshot_bytes: int
    ram_bytes: int | None
    pace: Pace | None
    evaluation_secs: float | None
    unmeasured: str
    evaluations: tuple[int, ...]
    evaluation_flops: int
    checkpoints: Checkpoints
    secs_left: float | None
    cache: CacheToMake | None = None

    @property
    def device_need(self) -> int:
        """Bytes of the device at once; on a CPU the copy that is being saved lies there too."""
        return self.memory.peak + (self.snapshot_bytes if self.device.type == "cpu" else 0)


def forecast(target: Target, clock: Callable[[], float] = time.perf_counter) -> Forecast:
    """Look at the data, compute, and take a few steps. Raises ConfigError, DataError, NoCheckpointError."""
    config, record = target.config, target.record
    device, numerics = apply_numerics(config.runtime, record.numerics if record else {})
    # A plan writes nothing: a cache that is there is used, and none is made.
    how = build.Preparation(cache=Path(config.paths.cache), looks_only=True, is_new=record is None)
    data = build.build_data(config.data, how)
    plan = build.build_plan(config, len(data.train))
    dims, parameters = build.build_dimensions(config, data.train.channels), _parameters(config, data.train.channels)
    start_step = _start_step(target)
    half = config.train.precision != "fp32"
    arithmetic = Arithmetic(
        half=half,
        written_out=half and device.type == "cpu",
        recomputes=config.runtime.gradient_checkpointing,
        in_parts=config.train.accumulate > 1,
    )
    at_once = -(-config.train.batch_size // config.train.accumulate)
    memory = step_memory(
        dims,
        arithmetic,
        num_parameters=parameters.all,
        num_trained=parameters.trained,
        batch_size=at_once,
        moments=MOMENTS[config.optimizer.name],
    )
    state_bytes = memory.lasting + FLOAT * dims.num_prototypes
    saves_beside = config.checkpoint.storage.background and bool(build.build_save_policy(config.checkpoint).policies)
    ram_bytes, snapshot_bytes = available_bytes(), state_bytes if saves_beside else 0
    device_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else ram_bytes
    measured = Measured(unmeasured=f"not measured: a step needs more than {device} has")
    if device_bytes is None or memory.peak <= device_bytes:
        measured = _measure(config, data, plan, device, start_step, clock)
    pace = measured.pace
    evaluations = _evaluations(plan, start_step)
    span = Span(start_step, max(plan.stop_step, start_step), plan.schedule, evaluations)
    end = deadline_secs(config.checkpoint.save.deadline, os.environ, time.time())
    return Forecast(
        device=device,
        threads=int(numerics["threads"]),
        num_images=len(data.train),
        start_step=start_step,
        plan=plan,
        dims=dims,
        step_flops=step_flops(dims, recomputes=arithmetic.recomputes),
        parameters=parameters,
        memory=memory,
        at_once=at_once,
        device_bytes=device_bytes,
        snapshot_bytes=snapshot_bytes,
        ram_bytes=ram_bytes,
        pace=pace,
        evaluation_secs=measured.evaluation_secs,
        unmeasured=measured.unmeasured,
        evaluations=evaluations,
        evaluation_flops=_evaluation_flops(dims, data),
        checkpoints=_checkpoints(target, span, None if pace is None else pace.secs_per_step, state_bytes, parameters),
        secs_left=None if end is None else end - time.time(),
        cache=_cache(config, data),
    )


def _cache(config: Config, data: Data) -> CacheToMake | None:
    num_bytes = build.cache_to_make(config.data, data)
    if num_bytes is None:
        return None
    return CacheToMake(num_bytes=num_bytes, free_bytes=LOCAL.free_bytes(_existing(Path(config.paths.cache))))


def _parameters(config: Config, channels: int) -> Parameters:
    """Counted on modules that hold no memory."""
    with torch.device("meta"):
        model = build.build_modules(config, channels)
    count = {part: sum(one.numel() for one in getattr(model, part).parameters()) for part in ("backbone", "head")}
    return Parameters(**count, trained=sum(one.numel() for one in model.parameters() if one.requires_grad))


def _start_step(target: Target) -> int:
    """The step that the training goes on from: that of the newest checkpoint, or of the parent's."""
    steps = CheckpointReader(target.paths.checkpoints).steps()
    if steps:
        return steps[-1]
    found = parent_checkpoints(target)
    return 0 if found is None else found[1]


def _evaluations(plan: TrainingPlan, start_step: int) -> tuple[int, ...]:
    """The steps that are still to be evaluated; 0 stands for the baselines of a new run."""
    if plan.evaluate_every_epochs is None:
        return ()
    every = plan.evaluate_every_epochs * plan.steps_per_epoch
    steps = {step for step in range(every, plan.stop_step + 1, every) if step > start_step}
    steps |= {plan.stop_step} if start_step < plan.stop_step == plan.horizon_steps else set()
    return tuple(sorted(steps | ({0} if start_step == 0 else set())))


def _evaluation_flops(dims: Dimensions, data: Data) -> int:
    """Features of all images, and the loss of the held-out ones."""
    features = (len(data.train) + len(data.val)) * backbone_flops(dims, dims.global_size)
    return features + len(data.val) * (forward_flops(dims, num_local=0) + forward_flops(dims))


def _checkpoints(
    target: Target, span: Span, secs_per_step: float | None, state_bytes: int, parameters: Parameters
) -> Checkpoints:
    config = target.config.checkpoint
    saves = num_saves(build.build_save_policy(config), span, secs_per_step)
    present = len(CheckpointReader(target.paths.checkpoints).steps())
    kept = most_kept(build.build_keep_policy(config), span, saves, present)
    num_models = 0 if config.keep.thin is None else len(THIN_PARTS[config.keep.thin])
    return Checkpoints(
        saves=saves,
        kept=kept,
        present=present,
        each_bytes=state_bytes,
        thin_bytes=num_models * FLOAT * parameters.all,
        free_bytes=LOCAL.free_bytes(_existing(target.paths.checkpoints)),
    )


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that there is."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured by doing it."""

    pace: Pace | None = None
    evaluation_secs: float | None = None
    unmeasured: str = ""


def _measure(
    config: Config, data: Data, plan: TrainingPlan, device: torch.device, start_step: int, clock: Callable[[], float]
) -> Measured:
    """Real steps on the real data with untrained weights, which take as long as any; why not where they cannot."""
    most_steps = plan.horizon_steps - start_step
    if most_steps < 1:
        return Measured(unmeasured="not measured: no step is left")
    schedules, augment = build.build_schedules(config, plan.steps_per_epoch), build.build_augment(config)
    try:
        state = build.build_state(config, data.train.channels, device)
        build.prepare_layers(config.runtime, state)
        rule = build.build_rule(config, read_every=build.read_every(state))
        with build.build_batches(config, data.train, start_step) as batches:

            def take_step() -> None:
                train_step(state, next(batches), augment=augment, schedules=schedules, rule=rule)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            pace = measure_pace(take_step, clock, most_steps=most_steps, lead=_AHEAD * config.runtime.workers)
        if plan.evaluate_every_epochs is None:
            return Measured(pace=pace)
        evaluator = build.build_evaluator(config, data, augment, schedules)
        return Measured(pace=pace, evaluation_secs=_evaluation_secs(evaluator, state, clock))
    except torch.OutOfMemoryError as error:
        return Measured(unmeasured=f"not measured: {str(error).splitlines()[0]}")
    except NonFiniteError as error:
        return Measured(unmeasured=f"not measured, with untrained weights: {error}")


def _evaluation_secs(evaluator: Evaluator, state: TrainState, clock: Callable[[], float]) -> float | None:
    """Of a real one; None where it takes long."""
    began = clock()
    try:
        evaluator.measure(state, lambda: clock() - began > _EVALUATION_SECS)
    except Interrupted:
        return None
    return clock() - began
