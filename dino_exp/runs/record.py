"""`run.json`: the record of a run, replaced atomically, read strictly.

It carries a digest of itself, because a flipped bit in a metric or a step would otherwise be believed.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dino_exp.errors import RefusedError
from dino_exp.fsio import DamagedFileError, read_json_bounded, write_atomic
from dino_exp.runs.jsontext import Json, pretty, spell
from dino_exp.runs.key import CODE_ID, CONFIG_HASH, parse_run_key
from dino_exp.runs.shape import (
    WrongShapeError,
    anything,
    flag,
    list_of,
    map_of,
    optional,
    real,
    record_of,
    text,
    whole,
)

FORMAT = 1
ENDED_STATES = ("stopped", "completed", "preempted", "failed", "interrupted")
STATES = ("running", *ENDED_STATES)
_MAX_BYTES = 8 << 20
_MAX_DEPTH = 16


@dataclass(frozen=True, kw_only=True)
class CodeRef:
    """The code of a run or an attempt, in short; `code/git.json` has the rest."""

    id: str
    commit: str | None
    dirty: bool | None

    def __post_init__(self) -> None:
        if not CODE_ID.fullmatch(self.id):
            raise ValueError(f"code.id: found {self.id[:80]!r}, expected 64 hex digits")


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One process working on the run. Times are ISO 8601, UTC; no `outcome`: it works, or was killed."""

    number: int
    started_at: str
    host: str
    pid: int
    code: CodeRef
    ended_at: str | None = None
    outcome: str | None = None
    resumed_from: int | None = None
    exact: bool = True
    why_not_exact: tuple[str, ...] = ()
    error: str | None = None
    job: str | None = None  # of a scheduler, see `runs.job`

    def __post_init__(self) -> None:
        if self.outcome is not None and self.outcome not in ENDED_STATES:
            raise ValueError(f"outcome: found {self.outcome[:80]!r}, expected one of {', '.join(ENDED_STATES)}")
        if self.exact == bool(self.why_not_exact):
            raise ValueError("an attempt is exact, or it says why not")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The length of the experiment in steps, and of one pass over the data."""

    horizon_steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        if self.horizon_steps < 1 or self.steps_per_epoch < 1:
            raise ValueError(f"schedule: expected steps >= 1, found {self.horizon_steps} and {self.steps_per_epoch}")


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best value so far of the metric that the run is judged by."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class FailedSave:
    """A save that the disk did not take, and none has succeeded since. `at` is ISO 8601, UTC."""

    step: int
    error: str
    at: str


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything that `run.json` says. `step` is of the newest commit; `metrics` are the latest, NaN allowed.

    `code` is that of the key; an attempt that continued with other code says so in its own. `tags` and `note` are the
    newest that an attempt was given.
    """

    run_key: str
    config_hash: str
    group_hash: str
    code: CodeRef
    schedule: Schedule
    state: str
    data_fingerprint: str | None = None
    parent: Json = None
    variant: str | None = None
    tags: tuple[str, ...] = ()
    note: str = ""
    attempts: tuple[AttemptRecord, ...] = ()
    numerics: Mapping[str, Json] = field(default_factory=dict)
    step: int = 0
    epochs_done: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Best | None = None
    trackers: Mapping[str, Json] = field(default_factory=dict)
    failed_save: FailedSave | None = None
    weights: Json = None  # of a file that the first attempt began with, and what of them fitted

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state: found {self.state[:80]!r}, expected one of {', '.join(STATES)}")
        if not CONFIG_HASH.fullmatch(self.config_hash):
            raise ValueError(f"config_hash: found {self.config_hash[:80]!r}, expected 'c1:' and 64 hex digits")
        self._check_key()
        if [attempt.number for attempt in self.attempts] != list(range(1, len(self.attempts) + 1)):
            raise ValueError("attempts: expected numbers from 1 without gaps")

    def _check_key(self) -> None:
        name = parse_run_key(self.run_key)
        if (
            name is None
            or not self.config_hash.partition(":")[2].startswith(name.config_digits)
            or not self.code.id.startswith(name.code_digits)
            or name.variant != self.variant
        ):
            raise ValueError(f"run_key: {self.run_key[:200]!r} does not belong to these hashes and this variant")

    def begin(self, attempt: AttemptRecord) -> RunRecord:
        """The record while `attempt` works; one before it that never said how it ended was interrupted."""
        earlier = tuple(a if a.outcome else replace(a, outcome="interrupted") for a in self.attempts)
        return replace(self, state="running", attempts=(*earlier, attempt))

    def end(self, state: str, *, ended_at: str, error: str | None = None) -> RunRecord:
        """The record after its newest attempt ended in `state` (one of ENDED_STATES)."""
        last = replace(self.attempts[-1], outcome=state, ended_at=ended_at, error=error)
        return replace(self, state=state, attempts=(*self.attempts[:-1], last))


def shown_state(record: RunRecord, lock_is_held: bool) -> str:
    """The state to show: a run that says it is running while no live owner holds its lock was interrupted."""
    return "interrupted" if record.state == "running" and not lock_is_held else record.state


def save_record(path: Path, record: RunRecord) -> None:
    """Replace `run.json` durably. Raises OSError, and then the old one stands."""
    members = _members(record)
    write_atomic(path, pretty({**members, "digest": _digest(members)}))


def load_record(path: Path) -> RunRecord | None:
    """Read `run.json`; None when there is none.

    Raises DamagedFileError for anything but a record that was written here, RefusedError for a newer format.
    """
    try:
        members = read_json_bounded(path, max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH)
    except FileNotFoundError:
        return None
    except DamagedFileError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(members, dict):
        raise _damaged(path, f"{path}: found {type(members).__name__}, expected an object")
    _check_format(path, members.get("format"))
    stated = members.pop("digest", None)
    if stated != _digest(members):
        raise _damaged(path, f"{path}: its digest does not match: some byte changed, or it was edited by hand")
    del members["format"]
    try:
        return _RUN(members)
    except WrongShapeError as error:
        raise _damaged(path, f"{path}: {error}") from error


def _members(record: RunRecord) -> dict[str, Json]:
    members = spell({"format": FORMAT, **asdict(record)})
    assert isinstance(members, dict)
    if record.weights is None:
        del members["weights"]  # newer than the format: what has none looks as it did before, to older versions too
    return members


def _digest(members: dict[str, Json]) -> str:
    canonical = json.dumps(members, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _check_format(path: Path, found: Json) -> None:
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise _damaged(path, f"{path}: format is {str(found)[:40]!r}, expected {FORMAT}")
    if found > FORMAT:
        raise RefusedError(
            f"{path}: written in format {str(found)[:40]}, this version reads {FORMAT}; install the newer one"
        )


def _damaged(path: Path, problem: str) -> DamagedFileError:
    listing = f"dino-exp checkpoints list {shlex.quote(str(path.parent))}"
    return DamagedFileError(f"{problem}. The checkpoints do not need it: `{listing}` shows them")


_CODE = record_of(CodeRef, {"id": text, "commit": optional(text), "dirty": optional(flag)})
_ATTEMPT = record_of(
    AttemptRecord,
    {
        "number": whole, "started_at": text, "host": text, "pid": whole, "code": _CODE,
        "ended_at": optional(text), "outcome": optional(text), "resumed_from": optional(whole), "exact": flag,
        "why_not_exact": list_of(text), "error": optional(text),
        "job": optional(text),
    },
)  # fmt: skip
_RUN = record_of(
    RunRecord,
    {
        "run_key": text, "config_hash": text, "group_hash": text, "code": _CODE, "state": text,
        "schedule": record_of(Schedule, {"horizon_steps": whole, "steps_per_epoch": whole}),
        "data_fingerprint": optional(text), "parent": anything, "variant": optional(text),
        "tags": list_of(text), "note": text, "attempts": list_of(_ATTEMPT), "numerics": map_of(anything),
        "step": whole, "epochs_done": whole, "metrics": map_of(real), "trackers": map_of(anything),
        "best": optional(record_of(Best, {"step": whole, "metric": text, "value": real})),
        "failed_save": optional(record_of(FailedSave, {"step": whole, "error": text, "at": text})),
        "weights": anything,
    },
    may_lack=("weights",),
)  # fmt: skip
