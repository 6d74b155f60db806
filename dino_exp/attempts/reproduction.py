"""Replay a part of a run from its recorded code, settings and state, and compare it with the original bit for bit.

The replay is a resume of a copy of the run, cut at the step that it starts from: so it reads the run's own settings,
and its threads and determinism are those that the run recorded. It is a process of its own, of the recorded code; where
the run was continued by other code or with other settings (`legs`), one after the other.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

import yaml

from dino_exp.attempts.whole import check_whole, whole_steps
from dino_exp.checkpoint.layout import PACKS, manifest_name
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.config.compare import ABSENT
from dino_exp.config.plain_yaml import parse_plain_yaml
from dino_exp.config.stored import CANONICAL_NAME, MAX_BYTES, YAML_NAME
from dino_exp.config.typed import override
from dino_exp.errors import CorruptCheckpointError, DinoExpError, UsageError
from dino_exp.fsio import LOCAL, DamagedFileError, make_dirs, write_atomic
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, save_record

_GRACE_SECS = 60.0  # in which a replay that is told to end has ended
_LAST_WORDS_SECS = 5.0  # in which what a replay said before its end has come through


@dataclass(frozen=True, kw_only=True)
class Span:
    """From which step to which; at `start` the run's checkpoint is taken, or its beginning for 0."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first thing that came out otherwise: a number of a row, or a tensor (or member) of a state."""

    step: int
    what: str
    was: Any
    now: Any


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and the first difference."""

    num_rows: int
    states: tuple[int, ...]
    difference: Difference | None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was compared, so that nothing is known."""
        return self.difference is None and not self.num_rows and not self.states


class StoppedError(DinoExpError):
    """A signal ended the replay."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; nothing was compared")
        self.exit_code = 128 + signum


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn signals that would end this process into StoppedError, so that a replay ends with it and is cleaned up.

    Only the first counts, so that nothing disturbs the cleaning up, but for another INT. One that is ignored stays so.
    """
    previous: dict[int, Any] = {}

    def stop(signum: int, _: FrameType | None) -> None:
        for number in previous:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)
        raise StoppedError(signum)

    for wanted in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(wanted) is not signal.SIG_IGN:
            previous[wanted] = signal.signal(wanted, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def choose_span(paths: RunPaths, record: RunRecord, *, at: int | None, num_steps: int | None) -> Span:
    """Which steps to replay: from `at`, `num_steps` of them or all.

    By default from the beginning: where that is a state of another run (a fork) or of a file, from the first checkpoint
    that is whole. Raises UsageError for steps that are not there, NoCheckpointError for one that is not whole.
    """
    reader = CheckpointReader(paths.checkpoints)
    whole = whole_steps(reader)
    has_origin = record.parent is not None or record.weights is not None
    if at is None:
        at = min(whole, default=0) if has_origin else 0
    if at not in whole and (at or has_origin):
        if at in reader.steps():
            check_whole(reader, reader.manifest(at), f"--at {at}")
        beginning = "" if has_origin else "; 0 is the beginning"
        there = ", ".join(map(str, whole)) or "none"
        raise UsageError(f"--at {at}: no checkpoint of this step; there are: {there}{beginning}")
    stop = record.step if num_steps is None else min(at + num_steps, record.step)
    if stop <= at:
        raise UsageError(f"{record.run_key} has come to step {record.step}; from step {at} there is nothing to replay")
    return Span(start=at, stop=stop)


def refuse_empty(paths: RunPaths, record: RunRecord, span: Span) -> None:
    """Raise UsageError, with a span that would do, where the run has nothing to compare a replay of this one with.

    Before the replay: after it, a word of equality would be said of nothing.
    """
    marks = {
        "row": _rows(paths, Span(start=span.start, stop=record.step)),
        "checkpoint": [step for step in CheckpointReader(paths.checkpoints).steps() if span.start < step],
    }
    first = {what: min(steps) for what, steps in marks.items() if steps}
    if any(step <= span.stop for step in first.values()):
        return
    told = f"nothing to compare in steps {span.start} to {span.stop}"
    if not first:
        raise UsageError(f"{told}: the run has no row and no checkpoint of a step after {span.start}")
    what = min(first, key=lambda name: first[name])
    raise UsageError(
        f"{told}: the first {what} of the run{f' after step {span.start}' if span.start else ''} is of step "
        f"{first[what]}; try --verify {first[what] - span.start}"
    )


def prepare_copy(paths: RunPaths, record: RunRecord, span: Span, outputs: Path) -> RunPaths:
    """The run below another outputs folder, as if it had been stopped at the start of the span. Raises OSError."""
    copy = RunPaths(outputs / "runs" / record.run_key)
    make_dirs(copy.directory)
    for name in (YAML_NAME, CANONICAL_NAME):
        shutil.copyfile(paths.directory / name, copy.directory / name)
    from_checkpoint = span.start in whole_steps(CheckpointReader(paths.checkpoints))
    if from_checkpoint:
        manifest = CheckpointReader(paths.checkpoints).manifest(span.start)
        make_dirs(copy.checkpoints / PACKS)
        for pack in manifest.packs:
            shutil.copyfile(paths.checkpoints / PACKS / pack.name, copy.checkpoints / PACKS / pack.name)
        shutil.copyfile(paths.checkpoints / manifest_name(span.start), copy.checkpoints / manifest_name(span.start))
        num_bytes = manifest.aside.get("metrics_bytes")
        with paths.metrics.open("rb") as rows:
            copy.metrics.write_bytes(rows.read(num_bytes if isinstance(num_bytes, int) else 0))
    attempts = tuple(replace(one, outcome=one.outcome or "interrupted") for one in record.attempts)
    per_epoch = record.schedule.steps_per_epoch
    cut = replace(
        record, state="stopped", step=span.start, epochs_done=span.start // per_epoch, metrics={}, best=None,
        failed_save=None, attempts=attempts, parent=record.parent if from_checkpoint else None,
    )  # fmt: skip
    save_record(copy.run_json, cut)
    return copy


def set_settings(paths: RunPaths, copy: RunPaths, changes: Mapping[str, Any]) -> None:
    """The settings of the copy from now on: the run's own, but for the `changes`. Raises DamagedFileError, OSError.

    They are changed as the file has them, without the schema: the code that is to read them may be of another version.
    """
    text = LOCAL.read_bytes(paths.directory / YAML_NAME, MAX_BYTES)
    if changes:
        settings = parse_plain_yaml(text, str(paths.directory / YAML_NAME))
        for key, value in changes.items():
            *sections, name = key.split(".")
            inner = settings
            for section in sections:
                inner = inner.get(section) if isinstance(inner, dict) else None
            if not isinstance(inner, dict):
                raise DamagedFileError(f"{paths.directory}: attempt settings name {key[:200]!r}, which is no setting")
            if value == ABSENT:
                inner.pop(name, None)
            else:
                inner[name] = value
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    write_atomic(copy.directory / YAML_NAME, text)


def replay(paths: RunPaths, copy: RunPaths, stop: int, code: Path, num_ranks: int = 1, *, keeps_copy: bool) -> int:
    """Train the copy to the step `stop` by the code below `code`; the exit code. It prints to standard error.

    By as many processes as the run's attempt had, all of them on this host: another number gives other bits. Whatever
    is raised meanwhile, by a signal, ends them too. `keeps_copy`: the copy stays, so lines that name it are of use.
    """
    places = [str(code), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "PYTHONSAFEPATH": "1"}
    environment.pop("DINO_EXP_RUN_DIR", None)
    words = [override("resume", copy.directory), f"train.stop_after_steps={stop}", "train.stop_after_epochs=null"]
    words += [override("paths.outputs", copy.directory.parent.parent), "logger.console=plain"]
    words += no_trackers(copy) + what_images_need(copy, paths.directory.parent.parent)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), "-m", "dino_exp.train", *words]
    child = subprocess.Popen(
        command, env=environment, cwd=copy.directory, stdout=subprocess.PIPE, text=True, errors="backslashreplace"
    )
    assert child.stdout is not None
    passing = threading.Thread(target=_pass_on, args=(child.stdout, None if keeps_copy else copy), daemon=True)
    passing.start()
    try:
        exit_code = child.wait()
        passing.join(_LAST_WORDS_SECS)  # not for ever: a process that the child left behind holds the pipe too
        return exit_code
    except BaseException:
        child.terminate()  # it ends in its own way, and its workers with it
        try:
            child.wait(_GRACE_SECS)
        finally:
            child.kill()
            child.wait()
        raise


def _pass_on(lines: IO[str], without: RunPaths | None) -> None:
    """Print what a replay prints, but for lines that name a run which is removed when it ends: nobody can use them.

    By what they name, since the code that prints them may be of any version.
    """
    with lines:
        for line in lines:
            if without is None or str(without.directory) not in line:
                sys.stderr.write(line)
                sys.stderr.flush()


def no_trackers(copy: RunPaths) -> list[str]:
    """The overrides that keep a replay from trackers, reports and profiles; none where its code knows of none."""
    chosen, runtime = _section(copy, "logger"), _section(copy, "runtime")
    words = [f"logger.{name}=false" for name in ("tensorboard", "report") if chosen.get(name)]
    words += ["runtime.profile=false"] if runtime.get("profile") else []
    return words + (["logger.wandb=null"] if chosen.get("wandb") else [])


def what_images_need(copy: RunPaths, outputs: Path) -> list[str]:
    """The overrides by which a replay on images in files finds what was prepared for its run."""
    chosen = _section(copy, "data")
    if chosen.get("unreadable") is None:
        return []
    return [override("paths.cache", outputs / "cache"), *(["data.cache=false"] if chosen.get("cache") else [])]


def _section(copy: RunPaths, name: str) -> dict[str, Any]:
    path = copy.directory / YAML_NAME
    settings = parse_plain_yaml(LOCAL.read_bytes(path, MAX_BYTES), str(path))
    section = settings.get(name) if isinstance(settings, dict) else None
    return section if isinstance(section, dict) else {}


def compare_replay(paths: RunPaths, copy: RunPaths, span: Span) -> Comparison:
    """Rows of the span, and states of every step that both have a checkpoint of. Raises DamagedFileError, OSError."""
    was, now = _rows(paths, span), _rows(copy, span)
    difference = next(_row_differences(was, now), None)
    ours, theirs = CheckpointReader(paths.checkpoints), CheckpointReader(copy.checkpoints)
    states = [step for step in ours.steps() if span.start < step <= span.stop and step in set(theirs.steps())]
    for step in states:
        if difference is not None and difference.step < step:
            break
        found = _state_difference(step, ours.manifest(step), theirs.manifest(step))
        if found is not None:
            difference = found
            break
    return Comparison(num_rows=len(was), states=tuple(states), difference=difference)


def _rows(paths: RunPaths, span: Span) -> dict[int, dict[str, Any]]:
    rows = {}
    for row in read_lines(paths.metrics):
        step = row.get("step")
        if isinstance(step, int) and span.start < step <= span.stop:
            rows[step] = {name: value for name, value in row.items() if name != "wall"}
    return rows


def _row_differences(
    was: Mapping[int, Mapping[str, Any]], now: Mapping[int, Mapping[str, Any]]
) -> Iterator[Difference]:
    for step in sorted({*was, *now}):
        one, other = was.get(step), now.get(step)
        if one is None or other is None:
            yield Difference(step=step, what="row", was=one is not None, now=other is not None)
            continue
        for name in dict.fromkeys((*one, *other)):
            if one.get(name) != other.get(name):
                yield Difference(step=step, what=name, was=one.get(name), now=other.get(name))


def _state_difference(step: int, was: Manifest, now: Manifest) -> Difference | None:
    """What differs. Of a checkpoint that was thinned the digest of the whole state is known, and a part of its tensors.

    So a difference in what was dropped is noticed too, but nobody can say where it lies.
    """
    digests = _full_digest(was), _full_digest(now)
    if digests[0] == digests[1] and None not in digests:
        return None
    is_whole = was.resumable and now.resumable
    named = {*was.tensors} | {*now.tensors} if is_whole else {*was.tensors} & {*now.tensors}
    for name in sorted(named):
        one, other = (_digests(manifest, name) for manifest in (was, now))
        if one != other:
            return Difference(step=step, what=name, was=one, now=other)
    for name in dict.fromkeys((*was.state, *now.state)):
        if was.state.get(name) != now.state.get(name):
            return Difference(step=step, what=name, was=was.state.get(name), now=now.state.get(name))
    if None in digests:
        return None
    if is_whole:
        raise CorruptCheckpointError(f"step {step}: equal states of different digests")
    return Difference(step=step, what="the state, in tensors that were not kept", was=digests[0], now=digests[1])


def _full_digest(manifest: Manifest) -> str | None:
    """The digest of the whole state, also where only a part of it was kept; None where it is not known."""
    return manifest.state_digest if manifest.resumable else manifest.full_state_digest


def _digests(manifest: Manifest, name: str) -> str | None:
    entry = manifest.tensors.get(name)
    return None if entry is None else " ".join(chunk.content_digest for chunk in entry.chunks)
