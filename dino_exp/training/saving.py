"""When the loop saves, what it does about a save that fails, and the last save before an exception ends it.

A save is begun between two steps and written beside the next ones; how it went is heard at the next step.
"""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING

from dino_exp.checkpoint.policies.save import EMERGENCY
from dino_exp.checkpoint.types import SaveContext
from dino_exp.checkpoint.writing import SaveRequest
from dino_exp.dino.health import Health
from dino_exp.errors import DinoExpError, SaveFailedError, TrainingError
from dino_exp.runs.signals import SAVE_SIGNAL

if TYPE_CHECKING:
    from dino_exp.checkpoint.manager import CheckpointManager
    from dino_exp.training.loop import Training

log = logging.getLogger(__name__)


class CollapseError(TrainingError):
    """The teacher's outputs no longer depend on the image."""


def handle_save(t: Training) -> None:
    """Hear how the save under way went, and begin one when the policy, a signal or the end of the attempt asks."""
    if t.manager is None:
        if t.signals.take_save_request():
            log.warning("asked to save at step=%d, but these settings never save (checkpoint=none)", t.state.step)
        return
    hear_of_save(t)
    wanted = t.signals.take_save_request()
    signum = t.signals.stop_signal or (SAVE_SIGNAL if wanted else None)
    context = SaveContext(
        step=t.state.step,
        schedule=t.plan.schedule,
        now_secs=t.clock(),
        last_save_secs=t.last_save_secs,
        last_saved_step=last_begun_step(t, t.manager),
        improved=t.improved,
        ending=t.state.step >= t.plan.stop_step,
        signal=None if signum is None else signal.Signals(signum).name,
        secs_left=t.secs_left(),
    )
    reasons = t.manager.due(context)
    if reasons:
        save(t, reasons)


def last_begun_step(t: Training, manager: CheckpointManager) -> int | None:
    """The newest step that a save was begun for.

    One that failed counts, unless it is the present step: a signal may try that again, and a deadline shall not try
    again at each step.
    """
    tried = None if t.tried_step == t.state.step else t.tried_step
    return max((step for step in (manager.latest_step(), tried) if step is not None), default=None)


def save(t: Training, reasons: tuple[str, ...], *, supersede: bool = False) -> None:
    """Begin to save the present state, after an earlier save has ended; the rows up to it reach the disk first."""
    assert t.manager is not None
    hear_of_save(t, wait=True)
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


def hear_of_save(t: Training, *, wait: bool = False) -> None:
    """Take note of a save that has ended. A disk that did not take it is told aloud, and training goes on.

    Raises any other error of a save: a state that may not be written, or a run that is another's now.
    """
    if t.manager is None:
        return
    try:
        manifest = t.manager.drain() if wait else t.manager.poll()
    except SaveFailedError as failure:
        note_failure(t, failure)
        return
    if manifest is not None:
        t.failed_save = None
        t.progress.saved(manifest.step, manifest.reasons)


def note_failure(t: Training, failure: SaveFailedError) -> None:
    """Say aloud and record that the disk did not take a checkpoint."""
    t.failed_save = failure
    log.warning("%s; %s; training goes on, and tries again when the next save is due", failure, last_commit(t))
    t.on_trouble(failure)


def emergency_save(t: Training, error: Exception) -> None:
    """Keep the last completed step when training ends by an exception, if that state is whole and finite."""
    if t.manager is None:
        return
    try:
        hear_of_save(t, wait=True)
        if t.manager.latest_step() == t.state.step:
            return
        if may_be_kept(t, error):
            save(t, (EMERGENCY,))
            hear_of_save(t, wait=True)
        else:
            error.add_note(f"nothing was saved at step {t.state.step}; {last_commit(t)}")
    except (DinoExpError, OSError, RuntimeError) as second:  # RuntimeError: a device that cannot be read any more
        if second is not error:
            error.add_note(f"the emergency save at step {t.state.step} failed as well: {second}; {last_commit(t)}")


def may_be_kept(t: Training, error: Exception) -> bool:
    """Whether the present state is that of a completed step, and owes no row that it does not know of.

    That it is finite is checked as it is written.
    """
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
    hear_of_save(t, wait=True)
    if t.failed_save is not None:
        raise UnsavedEndError(
            f"training came to step {t.state.step}, and its last checkpoint could not be saved: "
            f"{t.failed_save.problem}; {last_commit(t)}. Make room on the disk and type the same command again: it "
            "goes on from there"
        ) from t.failed_save


class UnsavedEndError(TrainingError):
    """The training ended, and what it reached is not on the disk."""
