"""The writing side of one run's checkpoints: when to save, commit, verify, keep, and what to restore.

Wiring only: policies decide, `writing` and `restoring` move the state, `store` orders the file operations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dino_exp.checkpoint.codec import RAW
from dino_exp.checkpoint.generators import capture_generators
from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.policies import KeepAny, SavePolicy, rank_best, retention_to_json
from dino_exp.checkpoint.registry import Row, missing_packs, read_index, row_of, write_registry
from dino_exp.checkpoint.restoring import Restored, load_into, nothing_to_load, read_verified, too_much_lost
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import CheckpointInfo, OnEvent, RetentionPlan, SaveContext, Schedule, Stateful
from dino_exp.checkpoint.writing import SaveRequest, Writer, write_state
from dino_exp.errors import CheckpointError, CorruptCheckpointError
from dino_exp.fsio import LOCAL, Files

log = logging.getLogger(__name__)


class CheckpointManager:
    """Checkpoints of one run, for the one process that owns it.

    Opening sweeps what dead attempts left and reconciles the registry. `attempt` tells this process from
    earlier ones of the run. `guard` is called just before each commit and may raise to prevent it;
    `on_event(kind, **fields)` hears of saved, dropped, quarantined, swept and trouble; `on_commit(info)`
    follows each verified commit.

    Raises UnsupportedFormatError where a newer version has written, CheckpointError for a folder that leads
    elsewhere, OSError.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        save: SavePolicy,
        keep: KeepAny,
        attempt: int = 1,
        on_commit: Callable[[CheckpointInfo], None] | None = None,
        guard: Callable[[], None] | None = None,
        on_event: OnEvent | None = None,
        max_lost_steps: int | None = None,
        codec: str = RAW,
        files: Files = LOCAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = Store(Path(directory), files)
        self._save_policy, self._keep, self._attempt = save, keep, attempt
        self._on_commit, self._guard, self._on_event = on_commit, guard, on_event
        self._max_lost_steps, self._clock, self._codec = max_lost_steps, clock, codec
        self._rows: dict[int, Row] = {}
        self._damaged: dict[int, str] = {}
        self._open()

    def due(self, context: SaveContext) -> tuple[str, ...]:
        """Why to save after this step; empty: do not."""
        return self._save_policy.should_save(context)

    def latest_step(self) -> int | None:
        """The newest step on disk, damaged or not: None means that nothing was ever saved here."""
        return max([*self._rows, *self._damaged], default=None)

    def infos(self) -> list[CheckpointInfo]:
        """Checkpoints by step ascending, with their pins.

        Raises CorruptCheckpointError if pins cannot be read.
        """
        pins = load_pins(self._store.folder, self._store.files)
        return [replace(row.info, pinned=step in pins) for step, row in sorted(self._rows.items())]

    def best(self) -> CheckpointInfo | None:
        """The best by the retention policy's first metric."""
        return next(iter(rank_best(self._keep, [row.info for row in self._rows.values()])), None)

    def plan(self, schedule: Schedule) -> RetentionPlan:
        """What retention would keep and drop now, and why. Nothing is changed."""
        return self._keep.plan(self.infos(), schedule)

    def save(self, state: Stateful, request: SaveRequest, *, supersede: bool = False) -> Manifest:
        """Save synchronously: when it returns, the checkpoint is durable and verified, and retention has run.

        A step that is committed already is not saved again; its manifest is returned. With `supersede` the new
        manifest takes its place by the same rename, for a state to which an owed evaluation was added; the
        attempt must be another one. Raises CheckpointError for a state that cannot be written, OSError (disk full,
        I/O error), and what `guard` raises: then nothing was committed, and earlier checkpoints are untouched.
        """
        step = request.step
        old = self._rows.get(step)
        if old is not None and not supersede:
            return self._store.read(step)[0]
        if step in self._damaged:
            self._quarantine(step)
        if old is not None or self._store.identity(step) is None:
            self._write(state, request, supersede=old is not None)
        else:
            self._store.files.sync_dir(self._store.folder)  # an earlier call was interrupted after its rename
        manifest = self._verify(step)
        if old is not None:
            self._store.remove_packs(self._own_packs(old.packs))
        self._tell("saved", step=step, reasons=list(manifest.reasons), bytes=manifest.stored_bytes)
        if self._on_commit is not None:
            self._on_commit(self._rows[step].info)
        self._retain(request.schedule)
        return manifest

    def restore(
        self,
        state: Stateful,
        at: str | int = "latest",
        *,
        optional: tuple[str, ...] = (),
        check: Callable[[Manifest], None] | None = None,
    ) -> Restored:
        """Load the newest good checkpoint ("latest"), the best good one ("best"), or one step, into `state`.

        Every byte is checked before the state is touched. Damaged checkpoints on the way are quarantined,
        once a good one is loaded. `optional`: prefixes of names that may be absent on one side (see
        `check_fit`). `check` may refuse a manifest that belongs elsewhere by raising, before the state is touched.

        Raises NoCheckpointError if none can be loaded or more than `max_lost_steps` would be lost (then
        nothing is moved), CheckpointError if the state does not fit, UnsupportedFormatError, OSError.
        """
        damaged: dict[int, str] = {}
        candidates = self._candidates(at)
        for step in candidates:
            try:
                manifest = self._read_good(step)
                lost_steps = max(candidates[0] - step, 0) if at == "latest" else 0
                if self._max_lost_steps is not None and lost_steps > self._max_lost_steps:
                    raise too_much_lost(self._store, damaged, step, lost_steps, self._max_lost_steps)
                if check is not None:
                    check(manifest)
                load_into(state, manifest, self._store, optional)
            except CorruptCheckpointError as damage:
                damaged[step] = self._damaged[step] = str(damage)
                continue
            self._rows[step] = replace(self._rows[step], info=replace(self._rows[step].info, verified=True))
            for bad_step in damaged:
                self._quarantine(bad_step)
            return Restored(manifest, lost_steps, tuple(damaged))
        raise nothing_to_load(self._store, at, damaged, sorted(self._rows.keys() - damaged.keys()))

    def _open(self) -> None:
        self._store.prepare()
        index = read_index(self._store)
        self._damaged = dict(index.damaged)
        for step, row in index.rows.items():
            problem = missing_packs(self._store, row)
            if problem is not None:
                self._damaged[step] = problem
            self._rows[step] = row
        # A manifest that cannot be read may reach any pack.
        swept = self._store.sweep(
            None if index.damaged else {name for row in self._rows.values() for name in row.packs}
        )
        self._rows = {step: row for step, row in self._rows.items() if step not in self._damaged}
        if swept:
            self._tell("swept", names=swept)
        if not index.current and index.schedule is not None:
            self._write_registry(index.policy, index.schedule)

    def _write(self, state: Stateful, request: SaveRequest, *, supersede: bool) -> None:
        name = PackName(request.step, self._attempt, 0)
        if any(str(name) in row.packs for row in self._rows.values()):
            raise CheckpointError(f"pack {name} belongs to another checkpoint; give each process its own `attempt`")
        writer = Writer(
            attempt=self._attempt,
            policy=retention_to_json(self._keep),
            now_secs=self._clock(),
            generators=capture_generators(),
            codec=self._codec,
        )
        try:
            manifest = write_state(self._store, name, state.state_dict(), request, writer)
            self._store.commit(manifest, self._guard, supersede=supersede)
        except BaseException:
            self._store.take_back(request.step, [str(name)])
            raise

    def _verify(self, step: int) -> Manifest:
        """Read a commit back from the disk, before anything may be dropped on its account."""
        try:
            manifest = read_verified(self._store, step)
        except CorruptCheckpointError as damage:
            self._damaged[step] = str(damage)
            self._quarantine(step)
            raise CheckpointError(f"step {step} was not what it should be when read back: {damage}") from damage
        identity = self._store.identity(step)
        assert identity is not None
        self._rows[step] = row_of(manifest, identity, verified=True)
        return manifest

    def _retain(self, schedule: Schedule) -> None:
        """Drop what no rule keeps.

        Trouble here is told and tried again after the next save: this one is safe.
        """
        try:
            plan = self.plan(schedule)
            for step in plan.drop:
                self._store.hide(step)
                packs = self._own_packs(self._rows.pop(step).packs)
                self._tell("dropped", step=step, reason=plan.reasons[step])
                self._store.erase(step, packs)
        except (OSError, CorruptCheckpointError) as problem:
            self._tell("trouble", action="retention", error=str(problem))
        self._write_registry(retention_to_json(self._keep), schedule)

    def _write_registry(self, policy: Any, schedule: Schedule) -> None:
        try:
            write_registry(self._store, self._rows.values(), policy, schedule)
        except OSError as problem:  # derived: losing it costs a rescan
            self._tell("trouble", action="write registry", error=str(problem))

    def _own_packs(self, packs: tuple[str, ...]) -> list[str]:
        reached = {name for row in self._rows.values() for name in row.packs}
        return [name for name in packs if name not in reached]

    def _quarantine(self, step: int) -> None:
        row = self._rows.pop(step, None)
        packs = self._store.packs_of_step(step) if row is None else list(row.packs)
        reason = self._damaged[step]
        folder = self._store.quarantine(step, self._own_packs(tuple(packs)), reason)
        del self._damaged[step]
        self._tell("quarantined", step=step, reason=reason, folder=folder.name)

    def _candidates(self, at: str | int) -> list[int]:
        if at == "latest":
            resumable = [step for step, row in self._rows.items() if row.info.resumable]
            return sorted({*resumable, *self._damaged}, reverse=True)
        if at == "best":
            return [info.step for info in rank_best(self._keep, [row.info for row in self._rows.values()])]
        return [step for step in {*self._rows, *self._damaged} if step == at]

    def _read_good(self, step: int) -> Manifest:
        if step in self._damaged:
            raise CorruptCheckpointError(self._damaged[step])
        return read_verified(self._store, step)

    def _tell(self, kind: str, **fields: Any) -> None:
        level = logging.WARNING if kind in ("quarantined", "trouble") else logging.INFO
        log.log(level, "%s %s", kind, " ".join(f"{name}={value}" for name, value in fields.items()))
        if self._on_event is not None:
            self._on_event(kind, **fields)
