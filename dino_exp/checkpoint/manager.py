"""The writing side of one run's checkpoints: when to save, commit, verify, keep, and what to restore.

Wiring only: policies decide, `snapshot` copies, `saving` and `restoring` move the state, the ledger knows what is
there, and the store orders the file operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dino_exp.checkpoint.background import Background
from dino_exp.checkpoint.generators import capture_generators
from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pace import Pace
from dino_exp.checkpoint.pieces import Piece
from dino_exp.checkpoint.policies import KeepAny, SavePolicy, may_skip, retention_to_json
from dino_exp.checkpoint.restoring import Restored, nothing_to_load, too_much_lost
from dino_exp.checkpoint.saving import OnCommit, Saver
from dino_exp.checkpoint.snapshot import HostBuffers
from dino_exp.checkpoint.storage import RAW_STORAGE, Storage
from dino_exp.checkpoint.types import (
    CheckpointInfo,
    OnEvent,
    RetentionPlan,
    SaveContext,
    SaveProgress,
    Schedule,
    Stateful,
)
from dino_exp.checkpoint.writers import OneWriter, Writers, take_job
from dino_exp.checkpoint.writing import SaveRequest, Writer
from dino_exp.errors import CheckpointError, CorruptCheckpointError, SaveFailedError
from dino_exp.fsio import LOCAL, Files


class CheckpointManager:
    """Checkpoints of one run, for the one process that owns it. Its methods are called from one thread.

    Opening sweeps what dead attempts left and reconciles the registry. `attempt` tells this process from earlier
    ones of the run. With `background`, `save` returns as soon as the state is copied, and the copy is written by a
    thread, at `max_bytes_per_sec` if given; else `save` writes the state itself and returns when all is done.
    `require_finite` refuses to commit NaN and infinities. `storage` says how states are encoded. `writers` are the
    processes that do it together with this one, none where it is None.

    From the thread that writes: `guard` is called just before each commit and may raise to prevent it;
    `on_event(kind, **fields)` hears of saved, skipped, dropped, quarantined, swept and trouble; `on_commit(info)`
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
        background: bool = True,
        max_bytes_per_sec: float | None = None,
        require_finite: bool = False,
        on_commit: OnCommit | None = None,
        guard: Callable[[], None] | None = None,
        on_event: OnEvent | None = None,
        max_lost_steps: int | None = None,
        storage: Storage = RAW_STORAGE,
        writers: Writers | None = None,
        files: Files = LOCAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ledger = Ledger(Path(directory), keep=keep, on_event=on_event, files=files)
        self._pace = Pace(max_bytes_per_sec if background else None)
        self._writers = OneWriter() if writers is None else writers
        self._saver = Saver(self._ledger, writers=self._writers, guard=guard, on_commit=on_commit)
        self._require_finite = require_finite
        self._save_policy, self._attempt, self._storage = save, attempt, storage
        self._max_lost_steps, self._clock = max_lost_steps, clock
        self._background: Background[Manifest] = Background(beside=background)
        self._buffers: HostBuffers[Piece] = HostBuffers()
        self._latest_step = self._ledger.latest_step
        self._step_under_way: int | None = None
        self._newer_than_state: int | None = None
        self._told_skip = False
        self._last_save_secs = clock()

    def due(self, context: SaveContext, *, is_saving: bool | None = None) -> tuple[str, ...]:
        """Why to save after this step; empty: do not.

        While a save is under way (at this moment, or as several processes have agreed), a save that is due only by an
        interval of steps or minutes is skipped, which is told once for each save under way.
        """
        reasons = self._save_policy.should_save(context)
        if not ((self.is_saving if is_saving is None else is_saving) and may_skip(reasons)):
            return reasons
        if not self._told_skip:
            self._told_skip = True
            self._ledger.tell("skipped", step=context.step, reasons=list(reasons), under_way=self._step_under_way)
        return ()

    def maybe_save(self, state: Stateful, request: SaveRequest, **context: Any) -> bool:
        """Ask the policy after a step, and save if it says so; whether a save was begun. For a loop with no more to it.

        `context`: what else the policy should know (see `SaveContext`). Raises what `poll` and `save` raise; that the
        disk did not take an earlier save is raised once the one that is due has begun.
        """
        self._refuse_second_history()  # also of a step that the policy takes for saved
        failures: list[SaveFailedError] = []
        self._ask(self.poll, failures)
        now_secs = self._clock()
        given = {"now_secs": now_secs, "last_save_secs": self._last_save_secs, "last_saved_step": self.latest_step()}
        reasons = self.due(SaveContext(step=request.step, schedule=request.schedule, **given | context))
        if reasons:
            self._ask(self.drain, failures)
            self.save(state, replace(request, reasons=reasons))
            self._last_save_secs = now_secs
        if failures:
            raise failures[0]
        return bool(reasons)

    @staticmethod
    def _ask(how: Callable[[], object], failures: list[SaveFailedError]) -> None:
        try:
            how()
        except SaveFailedError as failure:
            failures.append(failure)

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._background.is_busy

    @property
    def progress_of_save(self) -> SaveProgress:
        """How far the last save has come."""
        if self._step_under_way is None:
            return SaveProgress.NONE
        return SaveProgress.UNDER_WAY if self.is_saving else SaveProgress.ENDED

    def reasons_of(self, step: int) -> tuple[str, ...]:
        """Why a step was saved; nothing for one that is not there."""
        self.drain()
        row = self._ledger.rows.get(step)
        return () if row is None else row.info.reasons

    def healthy_steps(self) -> list[int]:
        """The steps whose checkpoints are of a healthy model, ascending."""
        self.drain()
        return sorted(step for step, row in self._ledger.rows.items() if row.info.healthy)

    def latest_step(self) -> int | None:
        """The newest step that is on disk, damaged or not, or on its way there; None when there is none."""
        return self._latest_step

    def infos(self) -> list[CheckpointInfo]:
        """Checkpoints by step ascending, with their pins. Raises CorruptCheckpointError if these cannot be read.

        Waits for a save under way, and raises its error, as the next two do.
        """
        self.drain()
        return self._ledger.infos()

    def best(self) -> CheckpointInfo | None:
        """The best by the retention policy's first metric."""
        self.drain()
        return next(iter(self._ledger.ranked()), None)

    def plan(self, schedule: Schedule) -> RetentionPlan:
        """What retention would keep and drop now, and why. Nothing is changed."""
        self.drain()
        return self._ledger.plan(schedule)

    def save(
        self,
        state: Stateful,
        request: SaveRequest,
        *,
        supersede: bool = False,
        late: Collection[str] = (),
        before_commit: Callable[[], object] | None = None,
    ) -> None:
        """Save the state as it is now. Waits for an earlier save, and raises its error, first.

        The caller may change the state when this returns; on a CUDA device, the tensors named in `late` only after
        `before_update`. A checkpoint is durable and verified once `poll` or `drain` has returned its manifest.
        A step that is committed already is not saved again. With `supersede` the new manifest takes its place by
        the same rename, for a state to which an owed evaluation was added; the attempt must be another one.
        `before_commit` is called by the writing thread before the manifest is written: what must be on disk first.

        Raises CheckpointError for a state that cannot be written, or that goes on from an older checkpoint than the
        newest here; without `background` also what `poll` raises.
        """
        self.drain()
        self._refuse_second_history()
        if self._ledger.holds(request.step) and not supersede:
            return
        writer = Writer(
            attempt=self._attempt,
            policy=retention_to_json(self._ledger.keep),
            now_secs=self._clock(),
            generators=capture_generators(),
            storage=self._storage,
        )
        job = take_job(
            state, request, writer, divide=self._writers.divide, late=late, supersede=supersede,
            buffers=self._buffers if self._background.beside else None, require_finite=self._require_finite,
            before_commit=before_commit, wrote=self._pace.wrote,
        )  # fmt: skip
        self._told_skip = False
        self._pace.begin()  # here and not in the thread, which may only begin when somebody waits for it already
        self._step_under_way, self._latest_step = request.step, max(request.step, self._latest_step or 0)
        try:
            self._background.start(partial(self._saver.save, job))
        except BaseException:
            self._end_save()
            raise

    def _refuse_second_history(self) -> None:
        if self._newer_than_state is not None:
            raise CheckpointError(
                f"{self._ledger.store.folder}: this state goes on from an older checkpoint than that of step "
                f"{self._newer_than_state}, and the history here is one line: save it to a folder of its own "
                "(CheckpointReader(here).restore(state, at), and a CheckpointManager of that folder)"
            )

    def before_update(self) -> None:
        """Call before `late` tensors are changed. The host never waits here; a CUDA device does for its copy."""
        self._buffers.wait_on_device()

    def poll(self) -> Manifest | None:
        """The manifest of a save that has ended since it was last asked for, without waiting.

        Raises SaveFailedError if the disk did not take it, CheckpointError for a state that cannot be written, and
        what `guard`, `before_commit`, `on_commit` and `on_event` raise.
        """
        return None if self.is_saving else self.drain()

    def drain(self) -> Manifest | None:
        """Wait for the save under way, at full speed whatever the limit. Returns and raises as `poll` does."""
        if self._step_under_way is None:
            return None
        self._pace.hurry()
        try:
            return self._background.take()
        finally:
            self._end_save()

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
        After an older one than the newest was asked for and loaded, nothing more can be saved here (see `save`).

        Raises NoCheckpointError if none can be loaded or more than `max_lost_steps` would be lost (then
        nothing is moved), CheckpointError if the state does not fit, UnsupportedFormatError, OSError.
        """
        self.drain()
        try:
            restored = self._restore(state, at, optional, check)
        except BaseException as problem:
            self._writers.end_load(problem, None)
            raise
        self._writers.end_load(None, restored)
        return restored

    def _restore(
        self, state: Stateful, at: str | int, optional: tuple[str, ...], check: Callable[[Manifest], None] | None
    ) -> Restored:
        ledger, damaged = self._ledger, dict[int, str]()
        candidates = ledger.candidates(at)
        for step in candidates:
            try:
                manifest = ledger.read_good(step)
                lost_steps = max(candidates[0] - step, 0) if at == "latest" else 0
                if self._max_lost_steps is not None and lost_steps > self._max_lost_steps:
                    raise too_much_lost(ledger.store, damaged, step, lost_steps, self._max_lost_steps)
                if check is not None:
                    check(manifest)
                self._writers.load(state, manifest, ledger.store, optional)
            except CorruptCheckpointError as damage:
                damaged[step] = ledger.damaged[step] = str(damage)
                continue
            ledger.mark_verified(step)
            aside = tuple(bad_step for bad_step in damaged if ledger.set_aside(bad_step))
            newest = max(ledger.rows.keys() - ledger.damaged.keys())
            self._newer_than_state = newest if at != "latest" and newest > step else None
            self._latest_step = ledger.latest_step
            return Restored(manifest, lost_steps, aside)
        raise nothing_to_load(ledger.store, at, damaged, sorted(ledger.rows.keys() - damaged.keys()))

    def _end_save(self) -> None:
        if self._background.is_held:  # whoever waited was interrupted: the buffers are still being written
            return
        self._step_under_way, self._latest_step = None, self._ledger.latest_step
