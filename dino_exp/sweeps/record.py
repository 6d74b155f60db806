"""`sweep.json`: the jobs of a sweep, replaced atomically, read strictly. What became of a job its run says itself."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dino_exp.errors import RefusedError, UsageError
from dino_exp.fsio import DamagedFileError, make_dirs, read_json_bounded, write_shared
from dino_exp.runs.jsontext import pretty
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.shape import WrongShapeError, list_of, optional, record_of, text

FORMAT = 1
FOLDER = "sweeps"
FILE_NAME = "sweep.json"
PAGE = "report.html"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One job. `run_key` and `state` are None where its settings were refused, and `problem` says why.

    `state` is the run's when the sweep was last seen to (see `runs.record.STATES`), or `new` where there was no run.
    `directory` is that of a run which does not lie below the outputs of the sweep.
    """

    overrides: tuple[str, ...]
    run_key: str | None
    state: str | None
    problem: str | None = None
    directory: str | None = None

    @property
    def identities(self) -> set[str | frozenset[str]]:
        """What tells it from other jobs: its run, and its overrides in any order, wherever runs lie."""
        typed = frozenset(word for word in self.overrides if not word.startswith("paths."))
        run = self.directory or self.run_key
        return {typed} if run is None else {run, typed}

    def paths(self, outputs: Path) -> RunPaths | None:
        """Where its run lies, or will; None where there is none."""
        if self.directory is not None:
            return RunPaths(Path(self.directory))
        return None if self.run_key is None else RunPaths(outputs / "runs" / Path(self.run_key).name)


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A sweep. `typed` are the overrides as typed, `options` what else a job needs, `launch` what is Hydra's.

    Times are ISO 8601, UTC.
    """

    name: str
    typed: tuple[str, ...]
    options: tuple[str, ...] = ()
    launch: tuple[str, ...] = ()
    launcher: str
    created_at: str
    updated_at: str
    jobs: tuple[JobRecord, ...]

    def words(self, typed: Sequence[str]) -> tuple[str, ...]:
        """What follows `train` in the line of this sweep with these overrides."""
        return ("--multirun", *self.options, *self.launch, *typed)

    def merged(self, earlier: SweepRecord | None) -> SweepRecord:
        """With the jobs that an earlier sweep of this name had and this one has not, behind its own."""
        if earlier is None:
            return self
        known = {identity for job in self.jobs for identity in job.identities}
        others = tuple(job for job in earlier.jobs if known.isdisjoint(job.identities))
        return replace(self, created_at=earlier.created_at, jobs=self.jobs + others)


def sweep_name(given: str | None, typed: Sequence[str]) -> str:
    """The name that was given, or one that is a function of the overrides, in whatever order they were typed."""
    if given is not None:
        return given
    words = sorted(word for word in typed if not word.startswith(("sweep.", "hydra", "paths.")))
    return "s-" + hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]


def sweep_path(outputs: Path, name: str) -> Path:
    """Where a sweep's record lies. Raises UsageError for a name that is none."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"sweep {name[:80]!r}: expected letters, digits, '.', '_' and '-'")
    return outputs / FOLDER / name / FILE_NAME


def resume_command(name: str, outputs: Path) -> str:
    """The line that goes on with a sweep."""
    return shlex.join(["dino-exp", "sweeps", "resume", name, "--outputs", str(outputs)])


def save_sweep(path: Path, sweep: SweepRecord) -> None:
    """Replace the record. Raises OSError."""
    make_dirs(path.parent)
    write_shared(path, pretty({"format": FORMAT, **asdict(sweep)}))


def load_sweep(path: Path) -> SweepRecord | None:
    """The record; None when there is none. Raises DamagedFileError, RefusedError for a newer format."""
    try:
        members = read_json_bounded(path, max_bytes=_MAX_BYTES, max_depth=8)
    except FileNotFoundError:
        return None
    if not isinstance(members, dict):
        raise DamagedFileError(f"{path}: found {type(members).__name__}, expected an object")
    found = members.pop("format", None)
    if type(found) is int and found > FORMAT:
        raise RefusedError(f"{path}: written in format {found}, this version reads {FORMAT}; install the newer one")
    try:
        return _SWEEP(members)
    except WrongShapeError as error:
        raise DamagedFileError(f"{path}: {error}. It may be removed: the runs do not need it") from error


def sweep_names(outputs: Path) -> list[str]:
    """The sweeps below an outputs folder."""
    found = (path.parent.name for path in outputs.glob(f"{FOLDER}/*/{FILE_NAME}"))
    return sorted(name for name in found if _NAME.fullmatch(name))


_JOB = record_of(
    JobRecord,
    {
        "overrides": list_of(text),
        "run_key": optional(text),
        "state": optional(text),
        "problem": optional(text),
        "directory": optional(text),
    },
    may_lack=("directory",),
)
_SWEEP = record_of(
    SweepRecord,
    {
        "name": text, "typed": list_of(text), "options": list_of(text), "launch": list_of(text), "launcher": text,
        "created_at": text, "updated_at": text, "jobs": list_of(_JOB),
    },
    may_lack=("launch",),
)  # fmt: skip
