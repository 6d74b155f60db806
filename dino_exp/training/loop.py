"""The training loop, from top to bottom.

The order at a step s, which later work relies on: the update; the evaluation due at s; the row of s; the save of s,
which copies the state and is written beside the next steps, the rows up to s before its manifest; then signals.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dino_exp.data.loader import Batch
from dino_exp.dino.collapse import collapse_kind, describe_collapse
from dino_exp.dino.schedules import Schedules
from dino_exp.errors import SaveFailedError
from dino_exp.evaluation.features import Interrupted
from dino_exp.runs.rows import Rows
from dino_exp.training.agreement import Signals, on_all
from dino_exp.training.evaluator import Evaluator
from dino_exp.training.parallel import ALONE, Parallel
from dino_exp.training.phases import phase
from dino_exp.training.plan import TrainingPlan
from dino_exp.training.saving import CollapseError, Keeper, emergency_save, end_saving, handle_save, hear_of_save, save
from dino_exp.training.state import Best, TrainState
from dino_exp.training.step import Augment, StepMetrics, StepRule, train_step
from dino_exp.training.verdict import settle

log = logging.getLogger(__name__)

FORK = "fork"  # why a checkpoint was saved: a new run takes over its parent's state
WEIGHTS = "initial weights"  # or begins with those of a file, which later attempts shall not need
EVALUATED = "evaluated"  # why a checkpoint was superseded: an earlier attempt owed its evaluation
COLLAPSE_ROWS = 10  # so many rows in a row must look collapsed before it is called so


class Progress(Protocol):
    """What shows the user how training goes; the console is one."""

    def advance(self, step: int, images_per_sec: float) -> None:
        """A step is done."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A metrics row was written."""

    def saved(self, step: int, reasons: tuple[str, ...]) -> None:
        """A checkpoint was committed."""


@dataclass(kw_only=True)
class Training:
    """The parts of one attempt, of each of its processes; what is written and printed is an affair of the first one.

    `batches` continues at `state.step`. `guard` raises when this process does not own the run any more; it is asked
    before each row. `begun_with`: why to save before the first step, FORK or WEIGHTS. `on_row` receives
    every written row and the state's best evaluation. `record` is copied verbatim into every manifest. `secs_left` is
    the time for which the machine is still there, None where nobody knows. `on_trouble` hears of each save that the
    disk did not take; `failed_save` is the last one, until a later one succeeds. `tried_step` is the step of the newest
    save that this attempt began.
    """

    state: TrainState
    batches: Iterator[Batch]
    augment: Augment
    schedules: Schedules
    rule: StepRule
    plan: TrainingPlan
    evaluator: Evaluator | None
    rows: Rows
    manager: Keeper | None
    signals: Signals
    progress: Progress
    record: Mapping[str, Any]
    guard: Callable[[], None]
    on_row: Callable[[Mapping[str, Any], Best | None], None]
    on_trouble: Callable[[SaveFailedError], None]
    parallel: Parallel = ALONE
    clock: Callable[[], float] = time.monotonic
    secs_left: Callable[[], float | None] = lambda: None
    latest: dict[str, Any] = field(default_factory=dict)
    improved: bool = False
    last_save_secs: float = 0.0
    begun_with: str | None = None
    failed_save: SaveFailedError | None = None
    tried_step: int | None = None
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.last_save_secs = self.clock()
        self.meter = Meter(self.clock, self.plan.batch_size)


@dataclass
class Meter:
    """Clock readings of the steps since the last row: throughput and the share of time spent waiting for data."""

    clock: Callable[[], float]
    batch_size: int
    num_steps: int = 0
    step_secs: float = 0.0
    wait_secs: float = 0.0

    def add(self, wait_secs: float, step_secs: float) -> None:
        """Count one step."""
        self.num_steps += 1
        self.wait_secs += wait_secs
        self.step_secs += step_secs

    @property
    def images_per_sec(self) -> float:
        """Images per second since the last row; 0 before the first step."""
        total = self.wait_secs + self.step_secs
        return self.num_steps * self.batch_size / total if total else 0.0

    def take_wall(self) -> dict[str, Any]:
        """The `wall` object of a row, after which counting starts anew."""
        total = self.wait_secs + self.step_secs
        wall = {
            "seconds": round(total, 4),
            "images_per_sec": round(self.images_per_sec, 2),
            "data_wait_share": round(self.wait_secs / total, 4) if total else 0.0,
        }
        self.num_steps, self.step_secs, self.wait_secs = 0, 0.0, 0.0
        return wall


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: `state` is the run's state, `signum` the signal that stopped it."""

    state: str
    step: int
    signum: int | None = None


def run_training(t: Training) -> Outcome:
    """Train from `t.state.step` to the stop.

    Raises NonFiniteError, CollapseError, and whatever a part raises; except after a collapse, the state of the last
    completed step is saved first where it is whole and finite.
    """
    try:
        begin(t)
        while t.state.step < t.plan.stop_step and t.signals.stop_signal is None:
            one_step(t)
            with phase("checkpoint"):
                handle_save(t)
        settle(t.state)
    except Exception as error:
        agreed = emergency_save(t, error)
        if agreed is not error:
            raise agreed from error
        raise
    return end(t)


def begin(t: Training) -> None:
    """Owe the first row of a new run, and write the row whose evaluation an earlier attempt still owes.

    A checkpoint that was saved with its evaluation pending is superseded by one that has it.
    """
    if t.state.step == 0 and t.rows.num_rows == 0 and t.evaluator is not None:
        t.state.pending_row = {"step": 0, "epoch": 0.0}
    settled = t.state.pending_row is not None and settle_row(t)
    if settled and t.manager is not None and t.manager.latest_step() == t.state.step:
        save(t, (*t.manager.reasons_of(t.state.step), EVALUATED), supersede=True)
        hear_of_save(t)
    first = t.begun_with is not None and t.manager is not None and t.manager.latest_step() is None
    if first and t.state.pending_row is None:
        assert t.begun_with is not None
        save(t, (t.begun_with,))
    t.signals.agree()


def one_step(t: Training) -> None:
    """The next batch, the step, and the row of the step where one is due."""
    started = t.clock()
    with phase("data wait"):
        batch = next_batch(t)
    waited = t.clock()
    row_due = t.plan.is_row_due(batch.step)
    metrics = train_step(
        t.state, batch, augment=t.augment, schedules=t.schedules, rule=t.rule, want_health=row_due,
        before_update=None if t.manager is None else t.manager.before_update, parallel=t.parallel,
    )  # fmt: skip
    t.meter.add(waited - started, t.clock() - waited)
    t.progress.advance(t.state.step, t.meter.images_per_sec)
    if row_due:
        with phase("row and evaluation"):
            t.state.pending_row = make_row(t, metrics)
            settle_row(t)


def next_batch(t: Training) -> Batch:
    """This process's share of the next batch. Raises DataError, on every rank, if one of them cannot load its own."""
    batches: list[Batch] = []
    on_all(t.parallel.ranks, lambda: batches.append(next(t.batches)))
    return batches[0]


def make_row(t: Training, metrics: StepMetrics) -> dict[str, Any]:
    """Everything exact about the step just done. Clock readings are added when the row is written."""
    state, index = t.state, t.state.step - 1
    assert metrics.health is not None
    note_collapse(t, metrics)
    return {
        "step": state.step,
        "epoch": t.plan.epoch_of(state.step),
        "loss": state.take_mean_loss(),
        "lr": t.schedules.lr_at(index),
        "weight_decay": t.schedules.weight_decay_at(index),
        "teacher_momentum": t.schedules.teacher_momentum_at(index),
        "teacher_temp": t.schedules.teacher_temp_at(index),
        **vars(metrics.health),
        "grad_norm": metrics.grad_norm,
        "grad_norm_head": metrics.grad_norm_head,
        "update_ratio": metrics.update_ratio,
    } | ({} if state.scaler is None else {"loss_scale": float(state.scaler.scale)})


def settle_row(t: Training) -> bool:
    """Carry out the evaluation that the pending row waits for, and write the row; whether it was written.

    When a stop signal comes first, the row stays pending in the state, and the next attempt settles it.
    """
    row = t.state.pending_row
    assert row is not None
    if t.evaluator is not None and (row["step"] == 0 or t.plan.is_evaluation_due(row["step"])):
        try:
            row = row | evaluate(t, t.evaluator)
        except Interrupted:
            log.info("evaluation of step=%d is put off: a stop was asked for", t.state.step)
            return False
    on_all(t.parallel.ranks, lambda: write_row(t, row))  # if this fails, the row is still owed
    t.state.pending_row = None
    note_best(t, row)
    t.latest = row
    t.on_row(row, t.state.best)
    t.progress.row(row)
    stop_if_collapsed(t)
    return True


def write_row(t: Training, row: Mapping[str, Any]) -> None:
    """Write a row, if this process still owns the run."""
    t.guard()
    t.rows.append({**row, "wall": t.meter.take_wall()})


def evaluate(t: Training, evaluator: Evaluator) -> dict[str, float]:
    """Baselines at step 0, the measures of the present state later."""

    def asked_to_stop() -> bool:
        t.signals.agree()
        return t.signals.stop_signal is not None

    return (
        evaluator.baselines(t.state, asked_to_stop) if t.state.step == 0 else evaluator.measure(t.state, asked_to_stop)
    )


def note_best(t: Training, row: Mapping[str, Any]) -> None:
    """Move the best evaluation, unless the metric is missing or NaN or the model looks collapsed.

    Another metric than before starts anew: values of two metrics cannot be compared.
    """
    value = row.get(t.plan.metric)
    if not t.plan.is_evaluation_due(row["step"]) or value is None or not t.state.healthy:
        return
    best = t.state.best if t.state.best is not None and t.state.best.metric == t.plan.metric else None
    if t.plan.is_better(value, None if best is None else best.value):
        t.state.best = Best(step=t.state.step, metric=t.plan.metric, value=value)
        t.improved = True


def note_collapse(t: Training, metrics: StepMetrics) -> None:
    """Count the rows in a row that look collapsed. Warm-up is exempt: an untrained model looks uniform."""
    assert metrics.health is not None
    kind = collapse_kind(metrics.health.entropy_ratio, metrics.health.kl)
    alarmed = kind is not None and t.state.step > t.plan.warmup_steps
    t.state.collapse_rows = t.state.collapse_rows + 1 if alarmed else 0
    t.state.healthy = t.state.collapse_rows < COLLAPSE_ROWS


def stop_if_collapsed(t: Training) -> None:
    """Say that the model has collapsed when it just did, and stop there if the settings ask for it."""
    if t.state.collapse_rows < COLLAPSE_ROWS:
        return
    ratio, kl = t.latest["entropy_ratio"], t.latest["kl"]
    kind = collapse_kind(ratio, kl)
    assert kind is not None
    message = f"step {t.state.step}: {describe_collapse(kind, entropy_ratio=ratio, kl=kl)}"
    if t.plan.on_collapse == "stop":
        raise CollapseError(message)
    if t.state.collapse_rows == COLLAPSE_ROWS:
        log.warning("%s", message)


def end(t: Training) -> Outcome:
    """Save a last time where an attempt was stopped before its first step, and say how it ended."""
    signum = t.signals.stop_signal
    if signum is not None and t.manager is not None and t.manager.latest_step() != t.state.step:
        handle_save(t)
    end_saving(t)
    t.rows.sync()
    if t.state.step >= t.plan.horizon_steps and t.state.pending_row is None:
        return Outcome("completed", t.state.step)
    if signum is not None:
        return Outcome("preempted", t.state.step, signum)
    return Outcome("stopped", t.state.step)
