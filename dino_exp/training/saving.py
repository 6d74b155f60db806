"""When the loop saves, what it does about a save that fails, and the last save before an exception ends it.

A save is begun between two steps and written beside the next ones; how it went is heard at the next step.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol

from dino_exp.checkpoint.policies.save import EMERGENCY
from dino_exp.checkpoint.types import Committed, SaveContext, SaveProgress, Stateful
from dino_exp.checkpoint.writing import SaveRequest
from dino_exp.dino.health import Health
from dino_exp.dist.ranks import is_of_a_lost_rank
from dino_exp.errors import DinoExpError, SaveFailedError, TrainingError
from dino_exp.runs.signals import SAVE_SIGNAL
from dino_exp.training.verdict import NonFiniteError, settle

if TYPE_CHECKING:
    from dino_exp.training.loop import Training

log = logging.getLogger(__name__)


class CollapseError(TrainingError):
    """The teacher's outputs no longer depend on the image."""


class Keeper(Protocol):
    """Who keeps checkpoints, as the loop sees it: the manager, or on the other ranks its members."""

    @property
    def progress_of_save(self) -> SaveProgress:
        """How far the last save has come."""

    def due(self, context: SaveContext, *, is_saving: bool | None = None) -> tuple[str, ...]:
        """Why to save after this step; empty: do not."""

    def latest_step(self) -> int | None:
        """The newest step that is on disk, or on its way there."""

    def reasons_of(self, step: int) -> tuple[str, ...]:
        """Why a step was saved."""

    def healthy_steps(self) -> list[int]:
        """The steps whose checkpoints are of a healthy model, ascending."""

    def save(
        self,
        state: Stateful,
        request: SaveRequest,
        *,
        supersede: bool = False,
        late: Collection[str] = (),
        before_commit: Callable[[], object] | None = None,
    ) -> None:
        """Begin to save the state as it is now."""

    def before_update(self) -> None:
        """Called before late tensors change."""

    def drain(self) -> Committed | None:
        """Wait for the save under way."""


def handle_save(t: Training) -> None:
    """Hear how the save under way went, and begin one when the policy, a signal or the end of the attempt asks.

    Of several ranks all go by the clock of the first, and by how far it has come with the last save.
    """
    now_secs, last_save_secs, progress, secs_left = t.signals.agree(_readings(t))
    wanted = t.signals.take_save_request()
    if t.manager is None:
        if wanted:
            log.warning("asked to save at step=%d, but these settings never save (checkpoint=none)", t.state.step)
        return
    if progress == SaveProgress.ENDED:
        hear_of_save(t)
    signum = t.signals.stop_signal or (SAVE_SIGNAL if wanted else None)
    context = SaveContext(
        step=t.state.step,
        schedule=t.plan.schedule,
        now_secs=now_secs,
        last_save_secs=last_save_secs,
        last_saved_step=last_begun_step(t, t.manager),
        improved=t.improved,
        ending=t.state.step >= t.plan.stop_step,
        signal=None if signum is None else signal.Signals(signum).name,
        secs_left=None if math.isnan(secs_left) else secs_left,
    )
    reasons = t.manager.due(context, is_saving=progress == SaveProgress.UNDER_WAY)
    if reasons:
        save(t, reasons)


def _readings(t: Training) -> tuple[float, float, float, float]:
    """What changes with the clock, in numbers."""
    left = t.secs_left()
    progress = SaveProgress.NONE if t.manager is None else t.manager.progress_of_save
    return t.clock(), t.last_save_secs, float(progress), math.nan if left is None else left


def last_begun_step(t: Training, manager: Keeper) -> int | None:
    """The newest step that a save was begun for.

    One that failed counts, unless it is the present step: a signal may try that again, and a deadline shall not try
    again at each step.
    """
    tried = None if t.tried_step == t.state.step else t.tried_step
    return max((step for step in (manager.latest_step(), tried) if step is not None), default=None)


def save(t: Training, reasons: tuple[str, ...], *, supersede: bool = False) -> None:
    """Begin to save the present state, after an earlier save has ended; the rows up to it reach the disk first."""
    assert t.manager is not None
    settle(t.state)
    hear_of_save(t)
    began, t.tried_step = time.perf_counter(), t.state.step
    position = t.rows.position
    here = t.latest if t.latest.get("step") == t.state.step else {}
    try:
        t.manager.save(
            t.state,
            SaveRequest(
                step=t.state.step,
                epoch=t.state.step // t.plan.steps_per_epoch,
                samples_seen=t.state.step * t.plan.batch_size,
                reasons=reasons,
                metrics={name: value for name, value in here.items() if isinstance(value, float)},
                health={name: here[name] for name in Health.__dataclass_fields__ if name in here},
                healthy=t.state.healthy,
                record=t.record,
                aside={"metrics_rows": position.num_rows, "metrics_bytes": position.num_bytes},
                schedule=t.plan.schedule,
            ),
            supersede=supersede,
            late=t.state.changed_by_update(),
            before_commit=t.rows.sync,
        )
    except SaveFailedError as failure:  # only where saves are not in the background
        note_failure(t, failure)
    t.last_save_secs, t.improved = t.clock(), False
    log.info("saving step=%d blocked_secs=%.3f", t.state.step, time.perf_counter() - began)


def hear_of_save(t: Training) -> None:
    """Take note of how the save under way ends. A disk that did not take it is told aloud, and training goes on.

    Raises any other error of a save: a state that may not be written, or a run that is another's now.
    """
    if t.manager is None:
        return
    try:
        committed = t.manager.drain()
    except SaveFailedError as failure:
        note_failure(t, failure)
        return
    if committed is not None:
        t.failed_save = None
        t.progress.saved(committed.step, committed.reasons)


def note_failure(t: Training, failure: SaveFailedError) -> None:
    """Say aloud and record that the disk did not take a checkpoint."""
    t.failed_save = failure
    log.warning("%s; %s; training goes on, and tries again when the next save is due", failure, last_commit(t))
    t.on_trouble(failure)


def emergency_save(t: Training, error: Exception) -> Exception:
    """Keep the last completed step when training ends by an exception, if that state is whole and finite on all ranks.

    Returns the error to end with: that of the rank that failed.
    """
    try:
        if not is_of_a_lost_rank(error):  # else the device may wait for that rank, and what is not settled is not kept
            settle(t.state)
    except NonFiniteError as found:  # the state goes back to the last step that counts, and may be kept
        error.add_note(f"before that, unnoticed: {found}")
    except RuntimeError as second:  # the device cannot be read any more, and what is not settled is not kept
        error.add_note(f"whether the steps up to {t.state.step} went well cannot be read: {second}")
    step = t.state.step
    parting = t.parallel.ranks.part(error, step if may_be_kept(t, error) else None)
    error = parting.error
    if t.manager is None:
        return error
    try:
        hear_of_save(t)
        if t.manager.latest_step() == step:
            return error
        if parting.may_save:
            save(t, (EMERGENCY,))
            hear_of_save(t)
        else:
            error.add_note(f"nothing was saved at step {step}; {last_commit(t)}")
    except (DinoExpError, OSError, RuntimeError) as second:  # RuntimeError: a device that cannot be read any more
        if second is not error:
            error.add_note(f"the emergency save at step {step} failed as well: {second}; {last_commit(t)}")
    return error


def may_be_kept(t: Training, error: Exception) -> bool:
    """Whether the present state is that of a completed step that counts, and owes no row that it does not know of.

    That it is finite is checked as it is written.
    """
    if t.state.unread:
        return False
    step = t.state.step
    row_is_missing = t.plan.is_row_due(step) and t.state.pending_row is None and t.latest.get("step") != step
    return not (step == 0 or t.state.torn or row_is_missing or isinstance(error, CollapseError))


def last_commit(t: Training) -> str:
    """Where the next attempt would start, in words."""
    step = None if t.manager is None else t.manager.latest_step()
    return "no checkpoint exists" if step is None else f"the last checkpoint is that of step {step}"


def end_saving(t: Training) -> None:
    """Wait for the last save.

    Raises UnsavedEndError where training came further than what the disk took.
    """
    hear_of_save(t)
    if t.failed_save is not None:
        raise UnsavedEndError(
            f"training came to step {t.state.step}, and its last checkpoint could not be saved: "
            f"{t.failed_save.problem}; {last_commit(t)}. Make room on the disk and type the same command again: it "
            "goes on from there"
        ) from t.failed_save


class UnsavedEndError(TrainingError):
    """The training ended, and what it reached is not on the disk."""
