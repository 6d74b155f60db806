"""What happened to a run, by its events and its checkpoints: attempts, saves, deletions with reasons, mishaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dino_exp.checkpoint.reader import Listing
from dino_exp.checkpoint.types import JSON
from dino_exp.runs.record import AttemptRecord, RunRecord

_OF_ATTEMPTS = ("attempt_started", "attempt_ended", "resumed", "began_again")
_OF_TRAINING = (
    "resumed", "began_again", "forked", "weights_loaded", "saved", "save_failed", "skipped", "profiled", "reported",
    "trouble",
)  # fmt: skip  # what only an attempt itself tells: others come from commands, too, when it is dead
_OF_SAVES = ("saved", "dropped")
_QUIET = ("swept", "reported")  # housekeeping


@dataclass(frozen=True, kw_only=True)
class Span:
    """One attempt. `begin` and `end` are steps; `end` is the last one that is known of it.

    `was_killed`: it never said how it ended; then `last_heard_at` is when it told the last thing, None where it told
    nothing. `rolled_back`: so many steps of the attempts before were done again.
    """

    number: int
    started_at: str
    begin: int
    end: int
    outcome: str
    was_killed: bool = False
    rolled_back: int = 0
    ended_at: str | None = None
    last_heard_at: str | None = None
    exact: bool = True
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Save:
    """One checkpoint that was committed. `dropped_because` is None while it is here; sizes are of what is here.

    `alone_bytes` are those that nothing else needs, `shared_bytes` those that others need, too.
    """

    step: int
    saved_at: str
    reasons: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    is_here: bool = False
    dropped_because: str | None = None
    alone_bytes: int = 0
    shared_bytes: int = 0
    is_whole: bool = True


@dataclass(frozen=True, kw_only=True)
class Incident:
    """Anything else that is worth telling, in words. `step` is None where it belongs to none."""

    time: str
    kind: str
    text: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """In the order of steps, or of time where there is none. `problem` says what could not be read."""

    horizon_steps: int
    steps_per_epoch: int
    spans: tuple[Span, ...]
    saves: tuple[Save, ...]
    incidents: tuple[Incident, ...]
    problem: str | None = None
    parent: JSON = None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def make_timeline(
    record: RunRecord,
    state: str,
    events: Sequence[Mapping[str, Any]],
    listing: Listing,
    *,
    last_row: int | None = None,
    problem: str | None = None,
) -> Timeline:
    """Put together what the record, the events and the checkpoints say.

    `state` is the run's, as it is to be shown, `last_row` the step of the last row of its metrics. Events of a
    stranger's file are taken as they come: what has not the expected form is passed over.
    """
    told = [event for event in events if isinstance(event.get("kind"), str)]
    return Timeline(
        horizon_steps=record.schedule.horizon_steps,
        steps_per_epoch=record.schedule.steps_per_epoch,
        spans=tuple(_spans(record, state, told, last_row)),
        saves=tuple(_saves(told, listing)),
        incidents=tuple(_incidents(told)),
        problem=problem,
        parent=record.parent,
    )


def _spans(record: RunRecord, state: str, events: Sequence[Mapping[str, Any]], last_row: int | None) -> Iterable[Span]:
    by_attempt = _by_attempt(events)
    rows = _rows_reached(by_attempt, len(record.attempts), last_row)
    reached = 0
    for attempt in record.attempts:
        known = by_attempt.get(attempt.number, [])
        steps = [step for event in known if event["kind"] in ("saved", "save_failed") if (step := _step(event))]
        begin = attempt.resumed_from or 0
        is_last = attempt.number == len(record.attempts)
        end = max([begin, *steps, rows.get(attempt.number, 0), *([record.step] if is_last else [])])
        has_trained = end > begin or attempt.resumed_from is not None
        yield Span(
            number=attempt.number,
            started_at=attempt.started_at,
            ended_at=attempt.ended_at,
            last_heard_at=_last_heard(known),
            begin=begin,
            end=end,
            outcome=attempt.outcome or state,
            was_killed=_was_killed(attempt, known, state),
            rolled_back=max(reached - begin, 0) if has_trained else 0,
            exact=attempt.exact,
            error=attempt.error,
        )
        reached = max(reached, end)


def _rows_reached(
    by_attempt: Mapping[int, Sequence[Mapping[str, Any]]], num_attempts: int, last_row: int | None
) -> dict[int, int]:
    """The step of the last row that each attempt wrote, as far as it is known.

    An attempt cuts the rows where it goes on, and tells how far they went. They are those of the last attempt before
    it that came so far as to cut them, too: one that was killed earlier wrote none.
    """
    found: dict[int, int] = {}
    writer = 1
    for number in range(2, num_attempts + 1):
        for event in by_attempt.get(number, ()):
            if event["kind"] in ("resumed", "began_again", "saved"):
                reached = event.get("reached")
                if type(reached) is int and number > writer:
                    found[writer] = reached
                writer = number
    if last_row is not None:
        found[writer] = last_row
    return found


def _last_heard(events: Sequence[Mapping[str, Any]]) -> str | None:
    times = [time for event in events if event["kind"] in _OF_TRAINING and isinstance(time := event.get("time"), str)]
    return times[-1] if times else None


def _was_killed(attempt: AttemptRecord, events: Sequence[Mapping[str, Any]], state: str) -> bool:
    said = any(event["kind"] == "attempt_ended" for event in events) or attempt.ended_at is not None
    return not said and (attempt.outcome or state) != "running"


def _by_attempt(events: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    number = 0
    for event in events:
        if event["kind"] == "attempt_started" and type(event.get("attempt")) is int:
            number = event["attempt"]
        found.setdefault(number, []).append(event)
    return found


def _saves(events: Sequence[Mapping[str, Any]], listing: Listing) -> list[Save]:
    saves: dict[int, Save] = {}
    for event in events:
        step = _step(event)
        if step is None:
            continue
        if event["kind"] == "saved":
            saves[step] = Save(step=step, saved_at=_text(event.get("time")), reasons=_texts(event.get("reasons")))
        elif event["kind"] in ("dropped", "quarantined"):
            known = saves.get(step, Save(step=step, saved_at=""))
            why = _text(event.get("reason")).removeprefix("drop: ")
            saves[step] = replace(known, dropped_because=why if event["kind"] == "dropped" else f"damaged: {why}")
    for row in listing.rows:
        known = saves.get(row["step"], Save(step=row["step"], saved_at=row["created_at"]))
        saves[row["step"]] = replace(
            known,
            kinds=tuple(row["kinds"]),
            is_here=True,
            dropped_because=None,
            alone_bytes=row["frees_bytes"],
            shared_bytes=row["shared_bytes"],
            is_whole=row["resumable"],
        )
    return [saves[step] for step in sorted(saves)]


def _incidents(events: Sequence[Mapping[str, Any]]) -> Iterable[Incident]:
    for event in events:
        kind = event["kind"]
        if kind in (*_OF_SAVES, *_OF_ATTEMPTS, *_QUIET):
            continue
        yield Incident(time=_text(event.get("time")), kind=kind, text=_words(event), step=_step(event))


def _words(event: Mapping[str, Any]) -> str:
    """What an event says, for people."""
    step = _step(event)
    where = "" if step is None else f" at step {step:,}"
    reason = _text(event.get("reason") or event.get("error") or event.get("note") or event.get("text"))
    match event["kind"]:
        case "quarantined":
            return f"step {step} was damaged and is set aside: {reason}"
        case "save_failed":
            return f"the save{where} failed: {reason}"
        case "skipped":
            return f"no save{where}: the one of step {event.get('under_way')} was still being written"
        case "forked":
            return f"began from its parent's state{where}"
        case "weights_loaded":
            return f"began with the weights of {_text(event.get('path'))}"
        case "pruned":
            return f"pruned by hand, {event.get('freed_bytes')} bytes freed"
        case "trouble":
            return f"{_text(event.get('action'))}: {reason}"
        case kind:
            return f"{kind.replace('_', ' ')}{where}{f': {reason}' if reason else ''}"


def _step(event: Mapping[str, Any]) -> int | None:
    step = event.get("step")
    return step if type(step) is int and step >= 0 else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, value)) if isinstance(value, list) else ()
