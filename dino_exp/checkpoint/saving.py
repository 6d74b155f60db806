"""Carrying out one save, from named tensors to a verified commit and the retention that follows it.

The order is the promise: synced packs, the manifest's rename, reading back, and only then dropping others.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from dino_exp.checkpoint.base import UnusableBaseError
from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pruning import foreign_packs
from dino_exp.checkpoint.shrinking import Shrinker
from dino_exp.checkpoint.storage import RAW_STORAGE
from dino_exp.checkpoint.types import CheckpointInfo
from dino_exp.checkpoint.writers import Hook, SaveJob, Writers
from dino_exp.checkpoint.writing import SaveRequest, bytes_needed
from dino_exp.dist.council import LostRankError
from dino_exp.errors import CheckpointError, CorruptCheckpointError, ManifestTooLargeError, SaveFailedError

OnCommit: TypeAlias = Callable[[CheckpointInfo], None]

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Saver:
    """Writes states into a ledger's folder, one at a time."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        writers: Writers,
        guard: Hook | None,
        on_commit: OnCommit | None,
    ) -> None:
        self._ledger, self._writers, self._guard, self._on_commit = ledger, writers, guard, on_commit

    def save(self, job: SaveJob) -> Manifest:
        """Write, commit, read back, and let retention follow.

        A full disk is answered by dropping what retention would drop next, if that frees anything, and one more try.
        Raises SaveFailedError where the disk does not take it, CheckpointError for a state that cannot be written,
        and what the hooks raise: then nothing was committed, and what may be left of it is swept at the next start.
        """
        ledger, step = self._ledger, job.request.step
        try:
            manifest = self._commit(job)
        except BaseException as problem:
            with contextlib.suppress(LostRankError):  # of whom nobody waits any more; the problem itself goes on
                self._writers.end_save(problem, None, ledger.latest_step)
            raise
        self._writers.end_save(None, manifest, ledger.latest_step)
        ledger.tell("saved", step=step, reasons=list(manifest.reasons), bytes=manifest.stored_bytes)
        if self._on_commit is not None:
            self._on_commit(ledger.rows[step].info)
        self._retain(job)
        return manifest

    def _commit(self, job: SaveJob) -> Manifest:
        """Write, commit and read back. Raises SaveFailedError where the disk does not take it."""
        ledger, step = self._ledger, job.request.step
        try:
            job.ready()
            if step in ledger.damaged:
                ledger.quarantine(step)
            old = ledger.rows.get(step)
            manifest = self._write_good(job)
            if old is not None:
                ledger.store.remove_packs(ledger.own_packs(old.packs))
        except OSError as problem:
            ledger.doubt(step)
            raise SaveFailedError(step, str(problem)) from problem
        return manifest

    def _retain(self, job: SaveJob) -> None:
        """Drop what no rule keeps, and make smaller what is kept. Trouble is told: what was saved is safe."""
        ledger, schedule = self._ledger, job.request.schedule
        plan = ledger.retain(schedule)
        if plan is None or not (plan.thin or foreign_packs(ledger.rows)):
            return
        shrinker = Shrinker(ledger, job.by.storage, self._guard, job.wrote)
        try:
            shrinker.thin(plan.thin)
            shrinker.compact(everything=False)
        except (OSError, CorruptCheckpointError) as problem:
            ledger.tell("trouble", action="making checkpoints smaller", error=str(problem))
        ledger.renew_registry(schedule)

    def _write_good(self, job: SaveJob) -> Manifest:
        """Write and read back. What turns out bad is written once more, as it is and without other checkpoints."""
        try:
            self._write_with_room(job)
            return self._read_back(job)
        except ManifestTooLargeError:  # what it builds on takes too many words
            if job.by.storage.codec == "raw":
                raise
        except CorruptCheckpointError as damage:
            self._set_aside(job.request.step, damage)
            if job.by.storage.codec == "raw":
                raise self._not_good(job, damage) from damage
        self._write_with_room(replace(job, by=replace(job.by, storage=RAW_STORAGE)))
        try:
            return self._read_back(job)
        except CorruptCheckpointError as damage:
            self._set_aside(job.request.step, damage)
            raise self._not_good(job, damage) from damage

    def _set_aside(self, step: int, damage: CorruptCheckpointError) -> None:
        """Quarantine it, and note those checkpoints that share its packs and are damaged too."""
        ledger = self._ledger
        with contextlib.suppress(CorruptCheckpointError):
            packs = {pack.name for pack in ledger.store.read(step, with_tensors=False)[0].packs}
            for other in [other for other, row in ledger.rows.items() if other != step and packs & {*row.packs}]:
                try:
                    ledger.read_good(other)
                except CorruptCheckpointError as known:
                    ledger.note_damage(other, str(known))
        ledger.damaged[step] = str(damage)
        ledger.quarantine(step)

    @staticmethod
    def _not_good(job: SaveJob, damage: CorruptCheckpointError) -> SaveFailedError:
        return SaveFailedError(job.request.step, f"it was not what it should be when read back: {damage}")

    def _write_with_room(self, job: SaveJob) -> None:
        try:
            self._write(job)
        except OSError as problem:
            if problem.errno not in _FULL:
                raise
            self._ledger.tell("trouble", action=f"save step {job.request.step}", error=str(problem))
            if not self._make_room(job.request):
                raise
            self._write(job)

    def _make_room(self, request: SaveRequest) -> bool:
        try:
            return self._ledger.make_room(request.info(), request.schedule)
        except CorruptCheckpointError as damage:  # pins that cannot be read: nothing may be dropped
            self._ledger.tell("trouble", action="make room", error=str(damage))
            return False

    def _write(self, job: SaveJob) -> None:
        """Commit the step, if it is not committed already by a call that was interrupted after its rename."""
        store, step = self._ledger.store, job.request.step
        found, known = store.identity(step), self._ledger.rows.get(step)
        if found is not None and (known is None or known.identity != found):
            store.files.sync_dir(store.folder)
            return
        names = {str(PackName(step, job.by.attempt, rank)) for rank in range(self._writers.num)}
        for taken in (names.intersection(row.packs) for row in self._ledger.rows.values()):
            if taken:
                raise CheckpointError(
                    f"pack {min(taken)} belongs to another checkpoint; give each attempt a number of its own"
                )
        self._check_room(bytes_needed(job.pieces.values(), job.by.storage))
        try:
            manifest = self._write_state(job)
            if job.before_commit is not None:
                job.before_commit()
            store.commit(manifest, self._guard, supersede=job.supersede)
        except BaseException:
            store.take_back(step, names)
            raise

    def _write_state(self, job: SaveJob) -> Manifest:
        """Against an earlier checkpoint where the storage says so, and where that can be read."""
        storage, store = job.by.storage, self._ledger.store
        base = self._ledger.newest_base(job.request.step, storage.max_chain) if storage.codec == "delta" else None
        try:
            return self._writers.write(job, store, base)
        except UnusableBaseError as problem:
            if problem.is_damage:
                self._ledger.note_damage(problem.step, problem.reason)
            else:
                self._ledger.tell("trouble", action=f"read step {problem.step}", error=problem.reason)
            return self._writers.write(job, store, None)

    def _check_room(self, num_bytes: int) -> None:
        """Fail at once, rather than after writing most of it, where the disk says that it has no room."""
        store = self._ledger.store
        free = store.files.free_bytes(store.folder)
        if free < num_bytes:
            raise OSError(
                errno.ENOSPC,
                f"the disk has {free / 1e6:,.1f} MB free, the checkpoint needs {num_bytes / 1e6:,.1f} MB",
                str(store.folder),
            )

    def _read_back(self, job: SaveJob) -> Manifest:
        """Read a commit back from the disk, before anything may be dropped on its account.

        What was encoded is decoded as well. Raises CorruptCheckpointError, OSError.
        """
        ledger, step = self._ledger, job.request.step
        manifest = ledger.read(step)
        self._writers.check(manifest, ledger.store)
        ledger.add(manifest)
        return manifest
