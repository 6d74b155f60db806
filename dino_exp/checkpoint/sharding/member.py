"""The checkpoints of a run, as its processes see them that do not commit: orders to carry out, and their end."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dino_exp.checkpoint.background import Background
from dino_exp.checkpoint.generators import capture_generators
from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.pace import Pace
from dino_exp.checkpoint.pieces import Piece
from dino_exp.checkpoint.policies import SavePolicy, may_skip
from dino_exp.checkpoint.restoring import Restored
from dino_exp.checkpoint.rewriting import check_content
from dino_exp.checkpoint.sharding.messages import CheckOrder, Commit, End, LoadOrder, WriteOrder
from dino_exp.checkpoint.sharding.team import Division, Talk, load_own_part
from dino_exp.checkpoint.snapshot import HostBuffers
from dino_exp.checkpoint.storage import RAW_STORAGE
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import SaveContext, SaveProgress, Stateful
from dino_exp.checkpoint.verify import check_packs
from dino_exp.checkpoint.writers import SaveJob, take_job, write_own_share
from dino_exp.checkpoint.writing import SaveRequest, Writer
from dino_exp.dist.council import Council, LostRankError
from dino_exp.fsio import LOCAL, Files


class Member:
    """Takes part in what the `CheckpointManager` of rank 0 does. It lists no folder, commits and drops nothing.

    The methods that a training loop calls are those of the manager, in the same order on every rank.
    """

    def __init__(
        self,
        directory: Path | str,
        council: Council,
        side: Council,
        *,
        save: SavePolicy,
        attempt: int,
        background: bool = True,
        max_bytes_per_sec: float | None = None,
        require_finite: bool = False,
        files: Files = LOCAL,
    ) -> None:
        self._store = Store(Path(directory), files)
        self._council, self._place = council, council.place
        self._division = Division(council)
        self._saves, self._loads = Talk(side, "save"), Talk(council, "load")
        self._save_policy, self._attempt, self._require_finite = save, attempt, require_finite
        self._pace = Pace(max_bytes_per_sec if background else None)
        self._background: Background[End] = Background(beside=background)
        self._buffers: HostBuffers[Piece] = HostBuffers()
        self._latest_step: int | None = None
        self._is_under_way = False
        self._committed: Commit | None = None  # by a save that is not in the background, to be heard of

    def due(self, context: SaveContext, *, is_saving: bool | None = None) -> tuple[str, ...]:
        """As the manager of rank 0 decides from the same context and what it knows of the save under way."""
        reasons = self._save_policy.should_save(context)
        return () if is_saving and may_skip(reasons) else reasons

    @property
    def progress_of_save(self) -> SaveProgress:
        """How far the last save has come here; what all ranks go by is that of rank 0."""
        if not self._is_under_way:
            return SaveProgress.NONE
        return SaveProgress.UNDER_WAY if self._background.is_busy else SaveProgress.ENDED

    def reasons_of(self, step: int) -> tuple[str, ...]:  # the manager writes them down
        """Known to rank 0 alone."""
        return ()

    def healthy_steps(self) -> list[int]:
        """Known to rank 0 alone."""
        return []

    def latest_step(self) -> int | None:
        """The newest step that is on disk, or on its way there."""
        return self._latest_step

    def save(
        self,
        state: Stateful,
        request: SaveRequest,
        *,
        supersede: bool = False,
        late: Collection[str] = (),
        before_commit: Callable[[], object] | None = None,
    ) -> None:
        """Copy this rank's part of the state, and write it when it is asked for.

        Does nothing where the manager's `save` does nothing, and raises what that raises.
        """
        self.drain()
        if request.step == self._latest_step and not supersede:
            return
        # Policy, clock and storage are the leader's: it says how to write, and describes what was written.
        by = Writer(
            attempt=self._attempt, policy=None, now_secs=0.0, generators=capture_generators(), storage=RAW_STORAGE
        )
        job = take_job(
            state, request, by, divide=self._division.divide, late=late,
            buffers=self._buffers if self._background.beside else None, require_finite=self._require_finite,
            wrote=self._pace.wrote,
        )  # fmt: skip
        self._pace.begin()
        self._latest_step, self._is_under_way = max(request.step, self._latest_step or 0), True
        self._background.start(partial(self._serve, job))
        if not self._background.beside:
            self._committed = self._hear_end()

    def before_update(self) -> None:
        """See `CheckpointManager.before_update`."""
        self._buffers.wait_on_device()

    def drain(self) -> Commit | None:
        """Wait for the save under way. Raises what the manager's `drain` raises."""
        if not self._is_under_way:
            return None
        self._pace.hurry()
        committed = self._hear_end() if self._background.beside else self._committed
        self._is_under_way = False
        return committed

    def _hear_end(self) -> Commit | None:
        try:
            end = self._take_end()
            self._latest_step = end.latest_step
            if end.trouble is not None:
                raise end.trouble.error(None)
        except BaseException:
            self._is_under_way = False
            raise
        return end.committed

    def restore(self, state: Stateful, *, optional: tuple[str, ...] = (), is_own: bool = True) -> Restored | None:
        """Load what rank 0 decides to load: a checkpoint of this run, or not (a fork's). Raises as `load_own_part`."""
        self._loads.begin()

        def carry_out(order: LoadOrder) -> None:
            load_own_part(state, order.manifest, Store(Path(order.folder), self._store.files), optional)

        end = self._loads.follow(carry_out)
        if end.trouble is not None:
            raise end.trouble.error(None)
        restored: Restored | None = end.restored
        self._latest_step = restored.manifest.step if restored is not None and is_own else None
        return restored

    def _serve(self, job: SaveJob) -> End:
        """Carry out the orders of one save."""
        self._saves.begin()

        def carry_out(order: WriteOrder | CheckOrder) -> Any:
            if isinstance(order, CheckOrder):
                return self._check(order)
            job.ready()
            mine = replace(job, by=replace(job.by, storage=order.storage))
            return write_own_share(mine, self._store, order.base, rank=self._place.rank)

        return self._saves.follow(carry_out)

    def _check(self, order: CheckOrder) -> None:
        manifest = order.manifest
        own = str(PackName(manifest.step, manifest.attempt, self._place.rank))
        others = [pack.name for pack in manifest.packs if pack.name != own]
        check_packs(manifest, self._store, elsewhere=others)
        check_content(manifest, self._store, packs={own})

    def _take_end(self) -> End:
        """The end of a save, also where the own thread is stuck in a write that does not return."""
        longest = 3 * self._council.timeout_secs + 20
        if not self._background.wait(longest):
            raise LostRankError(f"rank {self._place.rank}: writing a checkpoint did not end within {longest:g} s")
        end = self._background.take()
        assert end is not None
        return end
