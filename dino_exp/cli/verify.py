"""`dino-exp checkpoints verify`: read every byte of one run, or of all, and say what is damaged."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dino_exp.analysis.damage import summarise
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, named
from dino_exp.cli.progress import progress
from dino_exp.cli.show import plain, print_json
from dino_exp.config.typed import override, train_command
from dino_exp.errors import DinoExpError, NoCheckpointError, NothingSavedError, UsageError
from dino_exp.runs.find import all_runs
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record
from dino_exp.words import count_text

_MOST_LISTED = 20


@dataclass(frozen=True)
class Verdict:
    """What reading one run found: places as `CheckpointReader.verify` gives them, summed up for each damaged step.

    `state`: the digest of the state, where one checkpoint was asked for and is good.
    """

    run: str
    checked: int
    places: list[dict[str, Any]]
    summaries: dict[int, str]
    advice: str
    state: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For programs, beside other runs."""
        damaged = [{"run": self.run, **place} for place in self.places]
        return {"run": self.run, "ok": not damaged, "checked": self.checked, "damaged": damaged}


def verify(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN[@AT]", help="A run, or one of its checkpoints. Or give --all.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every run below the outputs folder.")] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Read every byte and compare it with its digest; exit 4 on damage, or where there is nothing to check.

    Changes nothing, and may look at a run while it is being trained.

    \b
    Examples:
      dino-exp checkpoints verify last          # all checkpoints of the run that was started last
      dino-exp checkpoints verify last@best     # one of them
      dino-exp checkpoints verify --all         # every run below outputs/
      dino-exp checkpoints verify --all --outputs /backup/outputs --json
    """
    if everything == (run is not None):
        raise UsageError("verify what? Expected a run or --all, for example: dino-exp checkpoints verify last")
    if run is None:
        verdicts = _verify_all(all_runs(outputs), quiet=as_json)
    else:
        verdicts = [_verify_named(run, outputs, quiet=as_json)]
    ok = not any(verdict.places for verdict in verdicts)
    if as_json:
        rows = [verdict.as_json() for verdict in verdicts]
        damaged = verdicts[0].places if run is not None else [place for row in rows for place in row["damaged"]]
        found: dict[str, Any] = {"ok": ok, "checked": sum(verdict.checked for verdict in verdicts), "damaged": damaged}
        found |= {"state_digest": verdicts[0].state} if verdicts[0].state else {}
        print_json(found if run is not None else {**found, "runs": rows})
    else:
        _tell(verdicts, plain(verdicts[0].run) if run is not None else count_text(len(verdicts), "run"))
    if not ok:
        raise typer.Exit(4)


def _verify_named(typed: str, outputs: Path, *, quiet: bool) -> Verdict:
    wanted = named(typed, outputs)
    reader, at = wanted.reader, wanted.at
    steps = None if at is None else [reader.resolve(at)]
    with progress("verifying", quiet=quiet) as bar:
        bar.expect(_num_bytes(wanted.paths.directory, steps))
        verdict = _verdict(wanted.paths, reader, steps, bar.reached)
    if not verdict.checked and not verdict.places:
        raise NothingSavedError(wanted.paths.directory)
    if steps is None or verdict.places:
        return verdict
    return replace(verdict, state=reader.state_digest(steps[0]))


def _verify_all(runs: list[Path], *, quiet: bool) -> list[Verdict]:
    """What ails one run is told with that run, and the others are read all the same."""
    sizes = [_num_bytes(run) for run in runs]
    verdicts: list[Verdict] = []
    with progress("verifying", quiet=quiet) as bar:
        bar.expect(sum(sizes))
        for index, run in enumerate(runs):
            verdicts.append(_verify_run(run, partial(_heard_after, bar.reached, sum(sizes[:index]))))
    return verdicts


def _heard_after(heard: Callable[[int], None], before: int, done: int) -> None:
    heard(before + done)


def _verify_run(run: Path, heard: Callable[[int], None]) -> Verdict:
    paths = RunPaths(run)
    try:
        return _verdict(paths, CheckpointReader(paths.checkpoints), None, heard)
    except (DinoExpError, OSError) as problem:
        place = {"step": None, "tensor": None, "pack": None, "reason": f"cannot be checked: {problem}"}
        return Verdict(str(run), 0, [place], {}, "")


def _num_bytes(run: Path, steps: list[int] | None = None) -> int:
    """How much there is to read; 0 where that is not known before reading, which will meet and tell the problem."""
    try:
        return CheckpointReader(RunPaths(run).checkpoints).num_bytes(steps)
    except (DinoExpError, OSError):
        return 0


def _verdict(
    paths: RunPaths, reader: CheckpointReader, steps: list[int] | None, heard: Callable[[int], None]
) -> Verdict:
    found = reader.verify(steps, progress=lambda done, _: heard(done))
    places = found["damaged"]
    damaged = sorted({place["step"] for place in places if place["step"] is not None})
    advice = ""
    if damaged:
        advice = (
            f"dino-exp checkpoints verify {shlex.quote(str(paths.directory))}   # the other checkpoints"
            if steps is not None
            else _advice(paths, damaged, _newest_good(reader, damaged))
        )
    summaries = {step: _summary(reader, [place for place in places if place["step"] == step]) for step in damaged}
    return Verdict(str(paths.directory), found["checked"], places, summaries, advice)


def _summary(reader: CheckpointReader, places: list[dict[str, Any]]) -> str:
    """For example `teacher backbone.blocks.7 damaged (2 tensors); student, optimizer, loss fine`."""
    try:
        tensors = list(reader.manifest(places[0]["step"]).tensors)
    except (DinoExpError, OSError):
        tensors = []
    names = [place["tensor"] for place in places if place["tensor"] is not None]
    return summarise(names, tensors, elsewhere=len(names) < len(places))


def _newest_good(reader: CheckpointReader, damaged: list[int]) -> int | None:
    """The newest that a training can go on from: of thinned ones only a part is there."""
    for step in reversed(reader.steps()):
        with contextlib.suppress(NoCheckpointError, FileNotFoundError):  # a training has dropped it meanwhile
            if step not in damaged and reader.manifest(step).resumable:
                return step
    return None


def _advice(paths: RunPaths, damaged: list[int], good: int | None) -> str:
    """The next command to type. `good`: the newest checkpoint that can be gone on from."""
    if good is None:
        return (
            "none of its checkpoints is good and whole: put them back from a copy, or start anew with "
            "run.variant=<name>"
        )
    if _is_finished(paths):
        fork = train_command(override("fork", f"{paths.directory}@{good}"))
        return f"{fork}   # a new run from its newest good one: it is finished"
    resume = train_command(override("resume", paths.directory))
    if good > damaged[-1]:
        return f"{resume}   # goes on from step {good}, the newest, which is good"
    bad = ", ".join(str(step) for step in damaged if step > good)
    return f"{resume}   # moves {bad} to quarantine/ and goes on from step {good}"


def _is_finished(paths: RunPaths) -> bool:
    try:
        record = load_record(paths.run_json)
    except (DinoExpError, OSError):
        return False
    return record is not None and record.state == "completed"


def _tell(verdicts: list[Verdict], where: str) -> None:
    bad = [verdict for verdict in verdicts if verdict.places]
    for verdict in bad:
        _tell_damage(verdict)
    checked = count_text(sum(verdict.checked for verdict in verdicts), "checkpoint")
    if not bad:
        if not any(verdict.checked for verdict in verdicts):
            print(f"nothing to check: {where} below, and no checkpoint")
            return
        state = f"; its state is {verdicts[0].state}" if verdicts[0].state else ""
        print(f"all good: {checked} of {where} checked, every byte{state}")
    elif len(verdicts) > 1:
        print(f"{checked} of {where} checked, every byte: damage in {count_text(len(bad), 'run')}")


def _tell_damage(verdict: Verdict) -> None:
    print(f"damage in {plain(verdict.run)}:")
    for step in (*verdict.summaries, None):
        reasons = [place["reason"] for place in verdict.places if place["step"] == step]
        if step is not None:
            print(f"  step {step}: {plain(verdict.summaries[step])}")
        for reason in reasons[:_MOST_LISTED]:
            print(f"    {plain(reason)}")
        if len(reasons) > _MOST_LISTED:
            print(f"    and {len(reasons) - _MOST_LISTED} more places, all of which --json names")
    if verdict.advice:
        print(f"  next: {plain(verdict.advice)}")
