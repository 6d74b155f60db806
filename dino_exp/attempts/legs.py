"""Which attempt made which steps of a run, by which code, and with which settings.

A later attempt throws away what earlier ones did beyond the step that it went on from. So the steps of a run as they
stand were made by one attempt after the other, each up to the step that the next one went on from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dino_exp.attempts.reproduction import Span
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.typed import setting_text
from dino_exp.errors import CorruptCheckpointError
from dino_exp.runs.changes import changed_settings
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import AttemptRecord, RunRecord

MAX_RANKS = 64  # on one host, for a replay: a record may come from a stranger
_OF_STOPPING = ("train.stop_after_steps", "train.stop_after_epochs")


@dataclass(frozen=True, kw_only=True)
class Leg:
    """Steps that were made by the same code, with the same settings, by as many processes.

    `attempt` is the first that made some of them. `changes`: what it was told to do otherwise than the run's first,
    by dotted key.
    """

    span: Span
    attempt: AttemptRecord
    changes: Mapping[str, Any]
    num_ranks: int

    def describe(self) -> str:
        """The settings that are not the run's own, in words."""
        told = [f"{key}={setting_text(value)}" for key, value in self.changes.items()]
        return ", ".join([*told, *([f"{self.num_ranks} processes"] if self.num_ranks > 1 else [])])


def legs_of(paths: RunPaths, record: RunRecord, span: Span) -> list[Leg]:
    """The legs of a span, in order. Raises DamagedFileError, CorruptCheckpointError, OSError."""
    found: list[Leg] = []
    for part, attempt in attempts_of(record.attempts, _beginnings(paths, record), span):
        told = {} if attempt.number == 1 else changed_settings(paths, attempt.number)
        changes = {key: value for key, value in told.items() if key not in _OF_STOPPING}
        leg = Leg(span=part, attempt=attempt, changes=changes, num_ranks=_num_ranks(paths, record, attempt))
        last = found[-1] if found else None
        if last is not None and _alike(last, leg):
            found[-1] = replace(last, span=Span(start=last.span.start, stop=part.stop))
        else:
            found.append(leg)
    return found


def attempts_of(
    attempts: Sequence[AttemptRecord], beginnings: Mapping[int, int], span: Span
) -> list[tuple[Span, AttemptRecord]]:
    """Who made which part of a span. `beginnings`: the step that each attempt went on from, where it made any."""
    found = []
    at = span.start
    while at < span.stop:
        made_by = max([number for number, step in beginnings.items() if step <= at], default=1)
        later = [step for number, step in beginnings.items() if number > made_by]
        stop = min([span.stop, *later])
        found.append((Span(start=at, stop=stop), attempts[made_by - 1]))
        at = stop
    return found


def _beginnings(paths: RunPaths, record: RunRecord) -> dict[int, int]:
    """Where each attempt began. One that was killed before it said so, after others had saved, has made nothing."""
    known = {one.number: one.resumed_from for one in record.attempts}
    if None not in (known[number] for number in known if number > 1):
        return {number: step or 0 for number, step in known.items()}
    found, has_saved = {}, False
    for event in read_lines(paths.events):
        number = event.get("attempt")
        if event.get("kind") == "attempt_started" and isinstance(number, int) and number in known:
            step = known[number]
            if step is not None or not has_saved:
                found[number] = step or 0
        has_saved = has_saved or event.get("kind") == "saved"
    return found or {1: known.get(1) or 0}


def _num_ranks(paths: RunPaths, record: RunRecord, attempt: AttemptRecord) -> int:
    """How many processes an attempt had, as its newest checkpoint says, or else as the run's first attempt had."""
    found = record.numerics.get("world_size", 1)
    if attempt.number > 1:
        reader = CheckpointReader(paths.checkpoints)
        for step in reversed(reader.steps()):
            try:
                manifest = reader.manifest(step)
            except CorruptCheckpointError:
                continue  # it is told when it is compared
            if manifest.attempt == attempt.number:
                found = manifest.world_size
                break
    return found if type(found) is int and 1 <= found <= MAX_RANKS else 1


def _alike(one: Leg, other: Leg) -> bool:
    return (one.attempt.code, one.changes, one.num_ranks) == (other.attempt.code, other.changes, other.num_ranks)
