"""Carry out a backup: check what is here, bring what is missing there, and commit it with an index.

The index is replaced last, in one step. Until then the target holds the backup of last time and some files more, which
nothing names; the same command finds them, reads them back, and goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dino_exp.backup.courier import Courier, Progress
from dino_exp.backup.index import INDEX, PARTIAL, Index, StoredCheckpoint, StoredFile, manifest_path, pack_path
from dino_exp.backup.plan import (
    LeftOut,
    StepPlan,
    keep_lost_files,
    lineage_problem,
    lost_steps,
    name_clash,
    plan_garbage,
    plan_steps,
    retire,
    same_content,
    sort_gone,
    whole_checkpoints,
)
from dino_exp.backup.source import attempts_of, only_one, other_files
from dino_exp.backup.target import Target
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.store import Identity, Store
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.checkpoint.verify import find_damage
from dino_exp.errors import CorruptCheckpointError, RefusedError, UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.jsontext import utc_text
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record

_NUM_TRIES = 3  # of a checkpoint that is replaced while it is copied
_UNREADABLE = (CorruptCheckpointError, UnsupportedFormatError, DamagedFileError, OSError)
_MAX_METRICS_BYTES = 2**62
_KEEPS_WHOLE = "the run thinned it; the target keeps the whole"


@dataclass(frozen=True, kw_only=True)
class BackupReport:
    """What a backup did. `spoiled`: files of the last one that were found changed or missing at the target."""

    num_files: int
    steps: tuple[int, ...]
    sent_steps: tuple[int, ...]
    kept_steps: tuple[int, ...]
    pruned_steps: tuple[int, ...]
    bytes_sent: int
    bytes_skipped: int
    left_out: tuple[LeftOut, ...]
    spoiled: tuple[str, ...]
    why_not_pruned: str | None

    @property
    def found_damage(self) -> bool:
        """Whether somebody must see to something, here or there."""
        return bool(self.spoiled) or any(item.damaged for item in self.left_out)


class _Brought(NamedTuple):
    """The checkpoints that are here, what was to be done with them, and what the target has of them and the rest."""

    here: dict[int, Identity | None]
    plan: StepPlan
    present: dict[int, StoredCheckpoint]
    sent_steps: list[int]
    files: list[StoredFile]


def back_up(
    paths: RunPaths, target: Target, *, prune: bool, reread: bool, clock: Callable[[], float], progress: Progress
) -> BackupReport:
    """Bring the backup at `target` up to date with a run, which may be in use.

    With `reread` everything there is read back, not only what is new or was written anew.
    With `prune` the target keeps no checkpoint that the run dropped, and no file of earlier backups of it.
    Raises RefusedError where the target holds another run's backup, LockedError while another backup of this run is
    under way, CorruptCheckpointError where an index or `run.json` is damaged, BackupError, OSError.
    """
    inside = target.local_folder
    if inside is not None and inside.resolve().is_relative_to(paths.directory.resolve()):
        raise UsageError(f"{target.shown}: lies inside the run {paths.directory}, expected a place outside it")
    with only_one(paths.directory, "a backup of this run"):
        record = load_record(paths.run_json)
        if record is None:
            raise UsageError(f"{paths.directory}: no run.json, so no run began here")
        courier = Courier(paths.directory, target, progress)
        return _Backup(paths, record, courier, clock, progress).run(prune=prune, reread=reread)


class _Backup:
    """One backup: what was found out and done so far."""

    def __init__(
        self, paths: RunPaths, record: RunRecord, courier: Courier, clock: Callable[[], float], progress: Progress
    ) -> None:
        self._paths, self._record, self._courier = paths, record, courier
        self._clock, self._progress = clock, progress
        self._store = Store(paths.checkpoints)
        self._store.refuse_links()
        self._left_out: list[LeftOut] = []
        self._thinned: dict[int, StoredCheckpoint] = {}  # brought, to take the place of whole ones if we may prune
        self._named: dict[str, StoredFile] = {}  # by the indexes that were found at the target

    def run(self, *, prune: bool, reread: bool) -> BackupReport:
        """Everything, in order."""
        before, unfinished = self._read_index(), self._read_partial()
        self._courier.look()
        indexes = [index for index in (before, unfinished) if index is not None]
        self._named = {stored: file for index in indexes for stored, file in index.named().items()}
        needed = {stored: file for index in indexes for stored, file in index.stored().items()}
        bad = self._courier.check(needed, reread=reread)
        known = whole_checkpoints(indexes, self._courier.good)
        here, plan, present, sent, files = self._bring_all(known, before, prune=prune)
        lost = [
            file
            for file in keep_lost_files(before, files, self._courier.good)
            if file.path != self._paths.failed.name  # a training that goes on removes it
        ]
        self._left_out += lost_steps(before, known, here, bad)
        told = self._lost_here(lost)
        if prune:
            self._check_here(plan.have)
        why_not = self._why_not_pruned({**present, **self._thinned}.values(), told) if prune else None
        may_prune = prune and why_not is None
        if may_prune:
            present.update(self._thinned)
            sent = sorted({*sent, *self._thinned})
        else:
            self._left_out += [*told, *(LeftOut(step=step, reason=_KEEPS_WHOLE) for step in self._thinned)]
            files += lost
        kept = [] if may_prune else self._keep_gone(plan, known, files)
        now = self._index([*present.values(), *kept], files)
        self._commit(now, before, prune=may_prune)
        named = {} if before is None else before.stored()
        content = sum(file.bytes for file in now.stored().values())
        return BackupReport(
            num_files=len(now.stored()),
            steps=tuple(checkpoint.step for checkpoint in now.checkpoints),
            sent_steps=tuple(sent),
            kept_steps=tuple(checkpoint.step for checkpoint in kept),
            pruned_steps=plan.gone if may_prune else (),
            bytes_sent=self._courier.bytes_sent,
            bytes_skipped=max(content - self._courier.content_sent, 0),
            left_out=tuple(self._left_out),
            spoiled=tuple(f"{stored} {problem}" for stored, problem in sorted(bad.items()) if stored in named),
            why_not_pruned=why_not,
        )

    def _read_index(self) -> Index | None:
        """The index that is in place. Raises RefusedError when it is not of this run, CorruptCheckpointError."""
        try:
            index = self._courier.read_index(INDEX)
        except CorruptCheckpointError as damage:
            damage.add_note(
                f"Put {INDEX} back from a copy, or remove it: the next backup finds the files that are there, and "
                "names those that the run still has"
            )
            raise
        return self._ours(index, "")

    def _read_partial(self) -> Index | None:
        """What an unfinished backup has brought. It only saves work, so one that cannot be read is none."""
        try:
            index = self._courier.read_index(PARTIAL)
        except CorruptCheckpointError as damage:
            self._left_out.append(LeftOut(file=PARTIAL, reason=f"{damage}; what it spoke for is read back"))
            return None
        return self._ours(
            index, f". That backup did not come to its end: remove {PARTIAL} to give its place to this run"
        )

    def _ours(self, index: Index | None, or_else: str) -> Index | None:
        """The same index. Raises RefusedError when it is of another run, or of another copy of this one."""
        if index is None:
            return None
        problem = lineage_problem(index, run_key=self._record.run_key, attempts=attempts_of(self._record))
        if problem is not None:
            raise RefusedError(
                f"{self._courier.target.shown}: {problem}; nothing was sent. Back up to another folder: one for each "
                f"run, and for each copy of a run that goes on by itself{or_else}"
            )
        return index

    def _bring_all(self, known: Mapping[int, StoredCheckpoint], before: Index | None, *, prune: bool) -> _Brought:
        """The checkpoints, then the rest: the logs are then at least as long as those need them.

        A run that comes to its end meanwhile is gone through once more: its record, which says so, must not travel
        without its last checkpoint, or whoever restores it is told that nothing is left to do.
        """
        num_told, all_sent = len(self._left_out), set[int]()
        while True:
            was_completed = self._is_completed()
            del self._left_out[num_told:]
            here = {step: self._store.identity(step) for step in self._store.steps()}
            plan = plan_steps(here, known)
            present, sent = self._bring_checkpoints(plan, known, prune=prune)
            files = self._bring_others(present.values(), before)
            all_sent |= set(sent)
            if was_completed or not self._is_completed():
                return _Brought(here, plan, present, sorted(all_sent & present.keys()), files)

    def _is_completed(self) -> bool:
        record = load_record(self._paths.run_json)
        return record is not None and record.state == "completed"

    def _bring_checkpoints(
        self, plan: StepPlan, known: Mapping[int, StoredCheckpoint], *, prune: bool
    ) -> tuple[dict[int, StoredCheckpoint], list[int]]:
        """Bring what is new, the newest first; those of the run that are there then, and the steps that were brought.

        After each of them the target hears what it has, so that a backup that is killed again and again comes to an
        end.
        """
        found = {step: known[step] for step in plan.have}
        brought: list[int] = []
        self._progress.expect(3 * CheckpointReader(self._paths.checkpoints).num_bytes(plan.send))
        for step in reversed(plan.send):
            made = self._bring_checkpoint(step, known.get(step), {**known, **found}, prune=prune)
            if made is None:
                continue
            found[step] = made
            if made != known.get(step):
                brought.append(step)
            if step != plan.send[0]:  # behind the last one comes the index itself
                self._courier.put_index(PARTIAL, self._index({**known, **found}.values(), ()))
        return found, sorted(brought)

    def _bring_checkpoint(
        self, step: int, older: StoredCheckpoint | None, others: Mapping[int, StoredCheckpoint], *, prune: bool
    ) -> StoredCheckpoint | None:
        """Bring one checkpoint, every byte checked; what the target has of it then, None for nothing."""
        problem = "it was replaced again and again while it was copied"
        for _ in range(_NUM_TRIES):
            identity = self._store.identity(step)
            try:
                manifest, read = self._store.read(step)
                if older is not None and older.resumable and not manifest.resumable and not prune:
                    self._left_out.append(LeftOut(step=step, reason=_KEEPS_WHOLE))
                    return older
                made = self._copy(manifest, read)
            except _UNREADABLE as damage:
                if step not in self._store.steps():
                    self._left_out.append(LeftOut(step=step, reason="the run dropped it meanwhile"))
                    return older
                if self._store.identity(step) == identity:
                    problem = str(damage)
                    break
            else:
                self._refuse_clash(made, others)
                if self._store.identity(step) in (read, None):  # None: dropped just now, and it is whole there
                    if older is None or made.resumable or not older.resumable:
                        return made
                    self._thinned[step] = made
                    return older
        kept = "" if older is None else "; the target keeps the good one of before"
        self._left_out.append(LeftOut(step=step, reason=f"{problem}{kept}", damaged=True))
        return older

    def _copy(self, manifest: Manifest, read: Identity) -> StoredCheckpoint:
        """Check every byte, then bring. Raises CorruptCheckpointError, OSError for what is wrong here."""
        damage = next(find_damage(manifest, self._store.files, self._store.packs_folder, self._progress.heard), None)
        if damage is not None:
            raise CorruptCheckpointError(damage.reason)
        packs = tuple(self._courier.bring(pack_path(pack.name)) for pack in manifest.packs)
        return StoredCheckpoint(
            step=manifest.step,
            seal=read[1],
            resumable=manifest.resumable,
            metrics_bytes=metrics_bytes(manifest),
            manifest=self._courier.bring(manifest_path(manifest.step)),
            packs=packs,
        )

    def _refuse_clash(self, made: StoredCheckpoint, others: Mapping[int, StoredCheckpoint]) -> None:
        clash = name_clash(made, (other for step, other in others.items() if step != made.step))
        if clash is not None:
            raise RefusedError(
                f"{self._courier.target.shown}: {clash} of step {made.step} has other content than the file of this "
                "name that another checkpoint there needs; the backup is left as it was. Back up to another folder"
            )

    def _bring_others(self, present: Iterable[StoredCheckpoint], before: Index | None) -> list[StoredFile]:
        paths, left_out = other_files(self._paths.directory)
        self._left_out += left_out
        brought = []
        for path in paths:
            try:
                brought.append(self._courier.bring(path))
            except FileNotFoundError:
                self._left_out.append(LeftOut(file=path, reason="it was removed meanwhile"))
            except (DamagedFileError, OSError) as problem:
                self._left_out.append(LeftOut(file=path, reason=str(problem), damaged=True))
        return self._without_cut_rows(brought, present, before)

    def _without_cut_rows(
        self, files: list[StoredFile], present: Iterable[StoredCheckpoint], before: Index | None
    ) -> list[StoredFile]:
        """All but a metrics.jsonl that lacks rows of a checkpoint beside it (no resume cuts it so short), if the target
        has a longer one.
        """
        left = self._store.steps()
        needed = max((one.metrics_bytes for one in present if one.resumable and one.step in left), default=0)
        rows = next((file for file in files if file.path == self._paths.metrics.name and file.bytes < needed), None)
        if rows is None:
            return files
        reason = f"has {rows.bytes} bytes in whole rows, and the checkpoints here need {needed}"
        self._left_out.append(LeftOut(file=rows.path, reason=reason, damaged=True))
        known = [] if before is None else before.files
        good = [file for file in known if file.stored in self._courier.good]
        longer = any(file.path == rows.path and file.bytes > rows.bytes for file in good)
        return [file for file in files if file != rows or not longer]

    def _lost_here(self, lost: Iterable[StoredFile]) -> list[LeftOut]:
        """What there is to tell of files that only the target has, where nothing was told yet."""
        told = {item.file for item in self._left_out}
        needed = {path.name for path in self._paths.needed_to_resume}
        return [
            LeftOut(file=file.path, reason="the run has it no more; the backup keeps it", damaged=file.path in needed)
            for file in lost
            if file.path not in told
        ]

    def _check_here(self, steps: Iterable[int]) -> None:
        """Check every byte of checkpoints that need not be sent: the target has what the run had once."""
        self._progress.expect(CheckpointReader(self._paths.checkpoints).num_bytes(steps))
        for step in steps:
            try:
                manifest, _ = self._store.read(step)
                folder, heard = self._store.packs_folder, self._progress.heard
                damage = next(find_damage(manifest, self._store.files, folder, heard), None)
                problem = None if damage is None else damage.reason
            except _UNREADABLE as unreadable:
                problem = str(unreadable)
            if problem is not None and step in self._store.steps():
                reason = f"{problem}; the target keeps the good one of before"
                self._left_out.append(LeftOut(step=step, reason=reason, damaged=True))

    def _why_not_pruned(self, present: Iterable[StoredCheckpoint], lost: Iterable[LeftOut]) -> str | None:
        """A backup is not made smaller on the word of a run that is not well."""
        if any(item.damaged for item in [*self._left_out, *lost]):
            return "something is damaged"
        if not any(checkpoint.resumable for checkpoint in present):
            return "the run has no checkpoint that can be resumed from"
        return None

    def _keep_gone(
        self, plan: StepPlan, known: Mapping[int, StoredCheckpoint], files: Iterable[StoredFile]
    ) -> list[StoredCheckpoint]:
        """What stays of the checkpoints that only the target has."""
        metrics_bytes = next((file.bytes for file in files if file.path == self._paths.metrics.name), None)
        kept, passed = sort_gone((known[step] for step in plan.gone), metrics_bytes=metrics_bytes)
        reason = "the run has gone back behind it; its files stay at the target, and the backup names them no more"
        self._left_out += [LeftOut(step=checkpoint.step, reason=reason) for checkpoint in passed]
        return kept

    def _index(self, checkpoints: Iterable[StoredCheckpoint], files: Iterable[StoredFile]) -> Index:
        made = Index(
            run_key=self._record.run_key,
            attempts=attempts_of(self._record),
            made_at=utc_text(self._clock()),
            checkpoints=tuple(sorted(checkpoints, key=lambda checkpoint: checkpoint.step)),
            files=tuple(files),
        )
        return retire(made, {**self._named, **self._courier.good}, self._courier.there)

    def _commit(self, now: Index, before: Index | None, *, prune: bool) -> None:
        """Put the index in place, and remove what is of no use any more."""
        garbage = plan_garbage(self._courier.there, now, before, prune=prune)
        is_new = not same_content(now, before)
        if (is_new or garbage) and self._courier.read_index(INDEX) != before:
            raise RefusedError(
                f"{self._courier.target.shown}: another backup was committed since this one began; its index is left "
                "as it is, and nothing was removed. The same command goes on from there"
            )
        if is_new:
            self._courier.put_index(INDEX, now)
        for path in garbage:
            self._courier.target.remove(path)


def metrics_bytes(manifest: Manifest) -> int:
    """How much of metrics.jsonl belongs to a checkpoint; 0 where it does not say."""
    found = manifest.aside.get("metrics_bytes")
    return found if isinstance(found, int) and 0 <= found <= _MAX_METRICS_BYTES else 0
