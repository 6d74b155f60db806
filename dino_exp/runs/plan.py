"""What a start of training means for the run that its key leads to. Pure: facts in, decision out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from dino_exp.runs.record import RunRecord

StartKind: TypeAlias = Literal["new", "continue", "finished", "stopped_already"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What to do, why, and whether the code differs from that of the run's first attempt."""

    kind: StartKind
    reason: str
    code_changed: bool = False


def decide(record: RunRecord | None, *, code_id: str, stop_step: int | None) -> Start:
    """Decide between a new run, continuing, and leaving a run alone.

    `stop_step` is the absolute step to stop at, None for the horizon. A run that reached its stop without
    saying so (killed just before) is continued, so that its closing work is done.
    """
    if record is None:
        return Start(kind="new", reason="no run of this key")
    horizon = record.schedule.horizon_steps
    changed = record.code.id != code_id
    if record.state == "completed":
        return Start(kind="finished", reason=f"completed all {horizon} steps", code_changed=changed)
    if stop_step is not None and stop_step < horizon:
        is_past = record.step > stop_step or (record.step == stop_step and record.state == "stopped")
        if is_past:
            reason = f"at step {record.step}, asked to stop at {stop_step}"
            return Start(kind="stopped_already", reason=reason, code_changed=changed)
    reason = f"{record.state} at step {record.step} of {horizon}"
    return Start(kind="continue", reason=reason, code_changed=changed)
