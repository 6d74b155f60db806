"""Carrying out one save, from named tensors to a verified commit and the retention that follows it.

The order is the promise: synced packs, the manifest's rename, reading back, and only then dropping others.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor

from dino_exp.checkpoint.base import UnusableBaseError
from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pace import Pace
from dino_exp.checkpoint.pruning import foreign_packs
from dino_exp.checkpoint.shrinking import Shrinker
from dino_exp.checkpoint.types import JSON, CheckpointInfo
from dino_exp.checkpoint.writing import SaveRequest, Writer, bytes_needed, write_state
from dino_exp.errors import CheckpointError, CorruptCheckpointError, SaveFailedError

OnCommit: TypeAlias = Callable[[CheckpointInfo], None]
Hook: TypeAlias = Callable[[], object]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """One save: named tensors and JSON, what to say of them, by whom, and what must happen around it.

    `ready` returns when the tensors hold the state. `before_commit` is called before the manifest is written.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, JSON]
    request: SaveRequest
    by: Writer
    supersede: bool
    ready: Hook
    before_commit: Hook | None


class Saver:
    """Writes states into a ledger's folder, one at a time."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        guard: Hook | None,
        on_commit: OnCommit | None,
        require_finite: bool,
        pace: Pace,
    ) -> None:
        self._ledger, self._guard, self._on_commit = ledger, guard, on_commit
        self._require_finite, self._pace = require_finite, pace

    def save(self, job: SaveJob) -> Manifest:
        """Write, commit, read back, and let retention follow.

        A full disk is answered by dropping what retention would drop next, if that frees anything, and one more try.
        Raises SaveFailedError where the disk does not take it, CheckpointError for a state that cannot be written,
        and what the hooks raise: then nothing was committed, and what may be left of it is swept at the next start.
        """
        ledger, step = self._ledger, job.request.step
        try:
            job.ready()
            if step in ledger.damaged:
                ledger.quarantine(step)
            old = ledger.rows.get(step)
            self._write_with_room(job)
            manifest = self._read_back(step)
            if old is not None:
                ledger.store.remove_packs(ledger.own_packs(old.packs))
        except OSError as problem:
            ledger.doubt(step)
            raise SaveFailedError(step, str(problem)) from problem
        ledger.tell("saved", step=step, reasons=list(manifest.reasons), bytes=manifest.stored_bytes)
        if self._on_commit is not None:
            self._on_commit(ledger.rows[step].info)
        self._retain(job)
        return manifest

    def _retain(self, job: SaveJob) -> None:
        """Drop what no rule keeps, and make smaller what is kept. Trouble is told: what was saved is safe."""
        ledger, schedule = self._ledger, job.request.schedule
        plan = ledger.retain(schedule)
        if plan is None or not (plan.thin or foreign_packs(ledger.rows)):
            return
        shrinker = Shrinker(ledger, job.by.storage, self._guard, self._pace.wrote)
        try:
            shrinker.thin(plan.thin)
            shrinker.compact(everything=False)
        except (OSError, CorruptCheckpointError) as problem:
            ledger.tell("trouble", action="making checkpoints smaller", error=str(problem))
        ledger.renew_registry(schedule)

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
        name = PackName(step, job.by.attempt, 0)
        if any(str(name) in row.packs for row in self._ledger.rows.values()):
            raise CheckpointError(f"pack {name} belongs to another checkpoint; give each process its own `attempt`")
        self._check_room(bytes_needed(job.tensors, job.by.storage))
        try:
            manifest = self._write_state(name, job)
            if job.before_commit is not None:
                job.before_commit()
            store.commit(manifest, self._guard, supersede=job.supersede)
        except BaseException:
            store.take_back(step, [str(name)])
            raise

    def _write_state(self, name: PackName, job: SaveJob) -> Manifest:
        """Against an earlier checkpoint where the storage says so, and where that can be read."""
        write = partial(
            write_state, self._ledger.store, name, job.tensors, job.values, job.request, job.by,
            require_finite=self._require_finite, wrote=self._pace.wrote,
        )  # fmt: skip
        storage = job.by.storage
        base = self._ledger.newest_base(job.request.step, storage.max_chain) if storage.codec == "delta" else None
        try:
            return write(base=base)
        except UnusableBaseError as problem:
            self._ledger.note_damage(problem.step, problem.reason)
            return write()

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

    def _read_back(self, step: int) -> Manifest:
        """Read a commit back from the disk, before anything may be dropped on its account."""
        ledger = self._ledger
        try:
            manifest = ledger.read_good(step)
        except CorruptCheckpointError as damage:
            ledger.damaged[step] = str(damage)
            ledger.quarantine(step)
            raise SaveFailedError(step, f"it was not what it should be when read back: {damage}") from damage
        ledger.add(manifest)
        return manifest
