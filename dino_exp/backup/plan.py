"""What a backup has to do: decided from what lies here and what lies there, and nothing else. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from dino_exp.backup.index import CHECKPOINTS, PARTIAL, Index, StoredCheckpoint, StoredFile
from dino_exp.checkpoint.store import Identity


@dataclass(frozen=True)
class Remote:
    """What the target says of a file: its size, and whatever changes when it is written anew."""

    bytes: int
    stamp: str


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A checkpoint or a file that is not in the backup, or not restored. `damaged`: somebody must see to it."""

    step: int | None = None
    file: str | None = None
    reason: str
    damaged: bool = False


@dataclass(frozen=True, kw_only=True)
class Stock:
    """Files that an index names, by where they lie: as they were, perhaps written anew, and surely not as they were."""

    good: Mapping[str, StoredFile]
    doubtful: Mapping[str, StoredFile]
    bad: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Steps ascending: those whose present version the target has, those to be sent, and those that only it has."""

    have: tuple[int, ...]
    send: tuple[int, ...]
    gone: tuple[int, ...]


def take_stock(files: Mapping[str, StoredFile], there: Mapping[str, Remote]) -> Stock:
    """Compare what an index names with what the target lists. Where only the stamp differs, reading tells."""
    good, doubtful, bad = {}, {}, {}
    for stored, file in files.items():
        found = there.get(stored)
        if found is None:
            bad[stored] = "is missing"
        elif found.bytes != file.bytes:
            bad[stored] = f"has {found.bytes} bytes, expected {file.bytes}"
        elif found.stamp != file.stamp:
            doubtful[stored] = file
        else:
            good[stored] = file
    return Stock(good=good, doubtful=doubtful, bad=bad)


def whole_checkpoints(indexes: Iterable[Index], good: Collection[str]) -> dict[int, StoredCheckpoint]:
    """Checkpoints with every file good, by step; of several versions that of the last index."""
    return {
        checkpoint.step: checkpoint
        for index in indexes
        for checkpoint in index.checkpoints
        if all(file.stored in good for file in checkpoint.files)
    }


def plan_steps(here: Mapping[int, Identity | None], there: Mapping[int, StoredCheckpoint]) -> StepPlan:
    """Which checkpoints to send. `here`: which version of each manifest the run has, None for a torn one."""
    have = {step for step, identity in here.items() if step in there and there[step].identity == identity}
    return StepPlan(
        have=tuple(sorted(have)),
        send=tuple(sorted(here.keys() - have)),
        gone=tuple(sorted(there.keys() - here.keys())),
    )


def sort_gone(
    gone: Iterable[StoredCheckpoint], *, metrics_bytes: int | None
) -> tuple[list[StoredCheckpoint], list[StoredCheckpoint]]:
    """Of the checkpoints that only the target has: those that the run dropped, and those of a future it has left.

    A run that lost its newest checkpoint goes on from an older one, and its metrics.jsonl is cut there. With the
    shorter file the lost one could not be resumed from, and it would hide those that can. None: how long the file is
    nobody knows, so all stay.
    """
    rows = sorted(gone, key=lambda checkpoint: checkpoint.step)
    if metrics_bytes is None:
        return rows, []
    return (
        [checkpoint for checkpoint in rows if checkpoint.metrics_bytes <= metrics_bytes],
        [checkpoint for checkpoint in rows if checkpoint.metrics_bytes > metrics_bytes],
    )


def lineage_problem(there: Index, *, run_key: str, attempts: Sequence[str]) -> str | None:
    """Why the backup is not of this run, or not of what came before it; None where it is.

    An attempt that the target knows and the run does not was made by another copy of the run.
    """
    if there.run_key != run_key:
        return f"holds the backup of {there.run_key}"
    if there.attempts != tuple(attempts[: len(there.attempts)]):
        other = next((attempt for attempt in there.attempts if attempt not in attempts), there.attempts[-1])
        return f"holds the backup of another copy of this run, with an attempt that this one lacks ({other[:200]})"
    return None


def lost_steps(
    before: Index | None, known: Collection[int], here: Collection[int], bad: Mapping[str, str]
) -> list[LeftOut]:
    """Checkpoints of the backup in place that only the target had, and has no more as they were."""
    return [
        LeftOut(step=checkpoint.step, reason=f"only the target had it: {file.stored} {bad[file.stored]}", damaged=True)
        for checkpoint in ([] if before is None else before.checkpoints)
        if checkpoint.step not in known and checkpoint.step not in here
        for file in [file for file in checkpoint.files if file.stored in bad][:1]
    ]


def keep_lost_files(before: Index | None, now: Iterable[StoredFile], good: Collection[str]) -> list[StoredFile]:
    """Files of the last backup, good at the target, that the run has no more, or not as they should be.

    One whose path is a folder now, or lies below what is a file now, was removed by whoever made that.
    """
    paths = {file.path for file in now}
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    return [
        file
        for file in ([] if before is None else before.files)
        if file.stored in good
        and file.path not in paths | folders
        and not paths & {str(parent) for parent in PurePosixPath(file.path).parents}
    ]


def name_clash(checkpoint: StoredCheckpoint, others: Iterable[StoredCheckpoint]) -> str | None:
    """A pack that another checkpoint has under the same name with other content; None where there is none."""
    content = {file.path: file.sha256 for other in others for file in other.packs}
    return next((file.path for file in checkpoint.packs if content.get(file.path, file.sha256) != file.sha256), None)


def retire(now: Index, named: Mapping[str, StoredFile], there: Collection[str]) -> Index:
    """`now`, with those of the named files as retired that are there and that it does not need."""
    gone = sorted((named.keys() & set(there)) - now.stored().keys())
    return replace(now, retired=tuple(named[stored] for stored in gone))


def plan_garbage(there: Collection[str], now: Index, before: Index | None, *, prune: bool) -> list[str]:
    """Which files at the target may go once `now` is in place: of those only that an index of this run has named.

    Without `prune` that is what logs and records were two backups ago: the versions of the last one stay, for whoever
    is restoring it at this moment. Packs and manifests go with `prune` only.
    """
    last = set() if before is None or prune else before.stored().keys()
    unwanted = [file for file in now.retired if file.stored not in last]
    partial = [PARTIAL] if PARTIAL in there else []
    return partial + [file.stored for file in unwanted if prune or not file.path.startswith(f"{CHECKPOINTS}/")]


def same_content(one: Index, other: Index | None) -> bool:
    """Whether two indexes say the same, whenever they were made.

    One that names retired files which are removed by now is as good: it need not be written anew.
    """
    if other is None or not set(one.retired) <= set(other.retired):
        return False
    return replace(one, made_at=other.made_at, retired=other.retired) == other
