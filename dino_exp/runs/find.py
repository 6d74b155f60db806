"""From what people type to a run directory: a folder, a prefix of a run key, or `last`."""

from __future__ import annotations

import difflib
import logging
import re
import shlex
from pathlib import Path

from dino_exp.errors import DinoExpError, UsageError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record

log = logging.getLogger(__name__)

_AT = re.compile(r"latest|best|[0-9]{1,18}")
_MAX_SHOWN = 8
_MAX_SHOWN_CHARS = 300


def split_at(named: str) -> tuple[str, str | None]:
    """`run@best` as ("run", "best"); a run alone as ("run", None).

    A folder may have an `@` in its path. Raises UsageError for anything after the `@` but latest, best or a
    step.
    """
    run, at_sign, at = named.rpartition("@")
    if not at_sign:
        return named, None
    if run and _AT.fullmatch(at):
        return run, at
    if "/" in at or _is_dir(named):
        return named, None
    raise UsageError(
        f"{_short(named)}: found {_short(at)!r} after '@', expected latest, best or a step, such as "
        f"`{_short(run) or 'last'}@best`"
    )


def find_run(outputs: Path, named: str) -> Path:
    """The directory of the run that `named` means. Raises UsageError with near or matching names."""
    if named == "last":
        return _last(outputs)
    folder = Path(named)
    if named and _is_file(RunPaths(folder).run_json):
        return folder
    if "/" in named or named in ("", ".", ".."):
        raise UsageError(f"{_short(named) or 'the empty text'}: no run directory (no run.json in it); {_hint(outputs)}")
    names = _run_names(outputs)
    matches = [name for name in names if name.startswith(named)]
    if named in matches or len(matches) == 1:
        return outputs / "runs" / (named if named in matches else matches[0])
    if matches:
        raise UsageError(
            f"{_short(named)!r} begins the keys of {len(matches)} runs: {_some(matches)}; type more of the key"
        )
    near = difflib.get_close_matches(named, names, n=_MAX_SHOWN, cutoff=0.5)
    hint = f"near: {_some(near)}" if near else _hint(outputs)
    raise UsageError(f"no run in {outputs} begins with {_short(named)!r}; {hint}")


def all_runs(outputs: Path) -> list[Path]:
    """Every folder of a run, also one whose record is lost but not its checkpoints. Raises UsageError for none."""
    folders = {path.parent for name in ("run.json", "checkpoints") for path in outputs.glob(f"runs/*/{name}")}
    if not folders:
        raise UsageError(f"no run in {outputs}; {_hint(outputs)}")
    return sorted(folders)


def _last(outputs: Path) -> Path:
    """The run whose newest attempt started last, by its own record: a copy changes the times of files."""
    started: list[tuple[str, str]] = []
    for name in _run_names(outputs):
        try:
            record = load_record(RunPaths(outputs / "runs" / name).run_json)
        except DinoExpError as error:
            log.warning("not considered for `last`: %s", error)
            continue
        if record is not None and record.attempts:
            started.append((record.attempts[-1].started_at, name))
    if not started:
        raise UsageError(f"last: no run in {outputs} has started; {_hint(outputs)}")
    return outputs / "runs" / max(started)[1]


def _run_names(outputs: Path) -> list[str]:
    return sorted(path.parent.name for path in outputs.glob("runs/*/run.json"))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_SHOWN]) + (", ..." if len(names) > _MAX_SHOWN else "")


def _hint(outputs: Path) -> str:
    return f"`ls {shlex.quote(str(outputs / 'runs'))}` shows the runs, `python -m dino_exp.train` starts one"


def _is_dir(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # a name too long to be one
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _short(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."
