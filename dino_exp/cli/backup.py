"""`dino-exp checkpoints backup|restore`: copy a run to another place, and get it back."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument, named_run
from dino_exp.cli.owning import own
from dino_exp.cli.progress import progress
from dino_exp.cli.show import plain, print_json
from dino_exp.config.typed import override, train_command
from dino_exp.errors import DinoExpError
from dino_exp.fsio import LOCAL
from dino_exp.runs.events import EventLog
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import load_record
from dino_exp.words import count_text, size_text

if TYPE_CHECKING:
    from dino_exp.backup.fetching import RestoreReport
    from dino_exp.backup.plan import LeftOut
    from dino_exp.backup.sending import BackupReport

_MOST_LISTED = 20

_URL_HELP = "A folder, file://…, s3://bucket/run, gs://bucket/run, ssh://host/folder: whatever fsspec opens."


def backup(
    run: RunArgument,
    url: Annotated[str, typer.Argument(metavar="URL", help=f"{_URL_HELP} One for each run.")],
    prune: Annotated[
        bool, typer.Option("--prune", help="Also remove there what the run has dropped. Else it is kept there.")
    ] = False,
    reread: Annotated[
        bool, typer.Option("--reread", help="Read back all that is there, and send again what has rotted.")
    ] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Bring the backup of a run up to date: checkpoints, settings, logs, records.

    Sends what is missing there, reads back what it sent, and commits it last.
    Killed at any moment, the same command goes on. A run in use may be backed
    up. Exit 4 if anything here or there is damaged; what is good is backed up
    all the same. Credentials are those of the backend (docs/backup.md).

    \b
    Examples:
      dino-exp checkpoints backup last /mnt/backup/digits
      dino-exp checkpoints backup vit_nano-67b8 s3://bucket/runs/digits --json
      dino-exp checkpoints backup last /mnt/backup/digits --reread   # after a restore found damage
    """
    wanted = named_run(run, outputs, "backup")
    from dino_exp.backup.sending import back_up  # here and below: what other verbs need not wait for
    from dino_exp.backup.target import Target

    with progress("backing up", quiet=as_json) as bar:
        target = Target(url, say=bar.say)
        done = back_up(wanted.paths, target, prune=prune, reread=reread, clock=time.time, progress=bar)
    if done.sent_steps or done.pruned_steps:
        _record(wanted.paths, target.shown, done)
    if as_json:
        print_json(_backup_for_programs(done))
    else:
        _tell_backup(wanted.paths, target.shown, done)
    if done.found_damage:
        raise typer.Exit(4)


def restore(
    url: Annotated[str, typer.Argument(metavar="URL", help=f"{_URL_HELP} As it was given to `backup`.")],
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="Where the run is to lie: new, or empty.")],
    as_json: JsonOption = False,
) -> None:
    """Get a run back from its backup, every byte checked.

    The run appears in its directory when all of it is there; until then the
    same command goes on with what was fetched. What is damaged is left out,
    aloud, and the exit code is 4. Then resume= continues the run, bit for bit.

    \b
    Examples:
      dino-exp checkpoints restore s3://bucket/runs/digits outputs/runs/digits
      python -m dino_exp.train resume=outputs/runs/digits
    """
    from dino_exp.backup import fetching
    from dino_exp.backup.target import Target

    with progress("restoring", quiet=as_json) as bar:
        target = Target(url, say=bar.say)
        done = fetching.restore(target, directory, progress=bar)
    if as_json:
        print_json(_restore_for_programs(done))
    else:
        _tell_restore(directory, target.shown, done)
    if done.left_out:
        raise typer.Exit(4)


def _record(paths: RunPaths, shown: str, done: BackupReport) -> None:
    """A row in events.jsonl, if nobody works on the run: the file has one writer, who knows where its lines end.

    Only where checkpoints were sent or removed: the row is itself sent by the next backup, and that must come to rest.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(DinoExpError, OSError))  # it is backed up; a row is worth no failure
        stack.enter_context(own(paths, "no event was written"))
        stack.enter_context(contextlib.closing(EventLog(paths.events, time.time))).append(
            "backed_up", url=shown, sent=list(done.sent_steps), pruned=list(done.pruned_steps), bytes=done.bytes_sent
        )


def _backup_for_programs(done: BackupReport) -> dict[str, Any]:
    return {
        "files": done.num_files,
        "bytes_sent": done.bytes_sent,
        "bytes_skipped": done.bytes_skipped,
        "checkpoints": list(done.steps),
        "sent": list(done.sent_steps),
        "kept": list(done.kept_steps),
        "pruned": list(done.pruned_steps),
        "left_out": _left_out_for_programs(done.left_out),
        "spoiled": list(done.spoiled),
        "verified": not done.found_damage,
    }


def _restore_for_programs(done: RestoreReport) -> dict[str, Any]:
    return {
        "run_key": done.run_key,
        "files": done.num_files,
        "bytes_fetched": done.bytes_fetched,
        "bytes_skipped": done.bytes_skipped,
        "checkpoints": list(done.steps),
        "left_out": _left_out_for_programs(done.left_out),
        "verified": not done.left_out,
    }


def _left_out_for_programs(left_out: Iterable[LeftOut]) -> list[dict[str, Any]]:
    return [{"step": item.step, "file": item.file, "reason": item.reason, "damaged": item.damaged} for item in left_out]


def _tell_backup(paths: RunPaths, shown: str, done: BackupReport) -> None:
    _tell_list("changed at the target since the last backup", done.spoiled)
    _tell_list("not backed up as it is here", _texts(done.left_out))
    if done.why_not_pruned is not None:
        print(f"nothing was pruned: {done.why_not_pruned}")
    parts = [f"{len(done.sent_steps)} sent"]
    if done.kept_steps:
        parts.append(f"{len(done.kept_steps)} that the run has dropped")
    if done.pruned_steps:
        parts.append(f"{len(done.pruned_steps)} removed there")
    sent = size_text(done.bytes_sent) + " sent and read back"
    print(
        plain(
            f"backed up {paths.directory.name} to {shown}: {count_text(len(done.steps), 'checkpoint')} "
            f"({', '.join(parts)}), {count_text(done.num_files, 'file')}; {sent}, {size_text(done.bytes_skipped)} "
            "were there"
        )
    )


def _tell_restore(directory: Path, shown: str, done: RestoreReport) -> None:
    _tell_list("damaged at the target, and left out", _texts(done.left_out))
    if done.left_out:
        mend = f"dino-exp checkpoints backup <run> {shlex.quote(shown)} --reread"
        print(f"  to mend it from the run, if that is still there: {plain(mend)}")
    fetched = f"{size_text(done.bytes_fetched)} fetched"
    if done.bytes_skipped:
        fetched += f", {size_text(done.bytes_skipped)} were here"
    print(
        plain(
            f"restored {done.run_key} from {shown}: {count_text(len(done.steps), 'checkpoint')}, "
            f"{count_text(done.num_files, 'file')}, every byte checked; {fetched}"
        )
    )
    lost = {item.file for item in done.left_out if item.file is not None}
    lines = [*_going_on(RunPaths(directory), lost), f"dino-exp checkpoints list {shlex.quote(str(directory))}"]
    print(f"  next: {plain(lines[0])}")
    for line in lines[1:]:
        print(f"        {plain(line)}")


def _going_on(paths: RunPaths, lost: set[str]) -> list[str]:
    """The command that goes on with a run that was restored without the files `lost`, if there is one."""
    from dino_exp.backup.sending import metrics_bytes

    reader = CheckpointReader(paths.checkpoints)
    manifests = [reader.manifest(step) for step in reader.steps()]
    newest = next((manifest for manifest in reversed(manifests) if manifest.resumable), None)
    if lost & {paths.config_yaml.name, paths.canonical_json.name} or (manifests and newest is None):
        return []
    resume = train_command(override("resume", paths.directory))
    if newest is None:
        return [resume]
    fork = train_command(override("fork", f"{paths.directory}@{newest.step}"))
    record = load_record(paths.run_json)
    if record is not None and record.state == "completed":
        more = "" if newest.step < record.schedule.horizon_steps else " train.epochs=<more>"
        return [f"{fork}{more}   # a new run from its newest good one: it is finished"]
    if (LOCAL.size(paths.metrics) or 0) < metrics_bytes(newest):
        return [f"{fork}   # a new run: {paths.metrics.name} lacks rows of this checkpoint"]
    return [resume]


def _texts(left_out: Iterable[LeftOut]) -> list[str]:
    return [
        f"step {item.step}: {item.reason}" if item.step is not None else f"{item.file}: {item.reason}"
        for item in left_out
    ]


def _tell_list(what: str, lines: Iterable[str]) -> None:
    found = list(lines)
    if found:
        print(f"{what}:")
    for line in found[:_MOST_LISTED]:
        print(f"  {plain(line)}")
    if len(found) > _MOST_LISTED:
        print(f"  and {len(found) - _MOST_LISTED} more, all of which --json names")
