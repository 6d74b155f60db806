"""Who carries out a save: this process alone, or several of which this one leads (see `sharding`)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pieces import Piece, whole_pieces
from dino_exp.checkpoint.restoring import Restored, load_into
from dino_exp.checkpoint.rewriting import check_content
from dino_exp.checkpoint.snapshot import HostBuffers
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import JSON, Stateful
from dino_exp.checkpoint.verify import check_packs
from dino_exp.checkpoint.writing import SaveRequest, Share, Writer, describe, split_state, write_share

Hook: TypeAlias = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class SaveJob:
    """One save: what this process writes of a state and its JSON, what to say of it, by whom, and what must happen
    around it.

    `ready` returns when the tensors hold the state. `before_commit` is called before the manifest is written.
    """

    pieces: Mapping[Piece, Tensor]
    values: Mapping[str, JSON]
    request: SaveRequest
    by: Writer
    supersede: bool
    require_finite: bool
    ready: Hook
    before_commit: Hook | None
    wrote: Callable[[int], None]


def take_job(
    state: Stateful,
    request: SaveRequest,
    by: Writer,
    *,
    divide: Callable[[Mapping[str, Tensor]], dict[Piece, Tensor]],
    buffers: HostBuffers[Piece] | None,
    late: Collection[str],
    require_finite: bool,
    wrote: Callable[[int], None],
    supersede: bool = False,
    before_commit: Hook | None = None,
) -> SaveJob:
    """Freeze a state and a request: what this process writes of it, copied into `buffers` where it is written beside.

    Raises CheckpointError for a state that cannot be written, and what `divide` raises.
    """
    tensors, values = split_state(state.state_dict())
    pieces = divide(tensors)
    if buffers is not None:
        pieces = buffers.copy(pieces, {piece for piece in pieces if piece.name in late})
    return SaveJob(
        pieces=pieces,
        values=copy.deepcopy(values),
        request=copy.deepcopy(request),
        by=by,
        supersede=supersede,
        require_finite=require_finite,
        ready=_ready_at_once if buffers is None else buffers.wait_on_host,
        before_commit=before_commit,
        wrote=wrote,
    )


def _ready_at_once() -> None:
    """The tensors are the state itself."""


class Writers(Protocol):
    """The processes that write and read a checkpoint together, seen from the one that commits it."""

    @property
    def num(self) -> int:
        """How many there are."""

    def divide(self, tensors: Mapping[str, Tensor]) -> dict[Piece, Tensor]:
        """What this process writes of a state; before it is copied, from the thread that trains."""

    def write(self, job: SaveJob, store: Store, base: Manifest | None) -> Manifest:
        """Have all packs written and synced. Raises as `write_share`, and LostRankError."""

    def check(self, manifest: Manifest, store: Store) -> None:
        """Have all that was written read back. Raises CorruptCheckpointError, OSError, LostRankError."""

    def end_save(self, problem: BaseException | None, manifest: Manifest | None, latest_step: int | None) -> None:
        """Let the others know how the save ended."""

    def load(self, state: Stateful, manifest: Manifest, store: Store, optional: tuple[str, ...]) -> None:
        """Load a checkpoint into the state of every process. Raises as `load_into`."""

    def end_load(self, problem: BaseException | None, restored: Restored | None) -> None:
        """Let the others know what was loaded."""


class OneWriter:
    """This process, and no other."""

    num = 1

    def divide(self, tensors: Mapping[str, Tensor]) -> dict[Piece, Tensor]:
        """Everything."""
        return whole_pieces(tensors)

    def write(self, job: SaveJob, store: Store, base: Manifest | None) -> Manifest:
        """One pack, or none where everything is there already."""
        return describe([write_own_share(job, store, base, rank=0)], job.values, job.request, job.by, base)

    def check(self, manifest: Manifest, store: Store) -> None:
        """Every byte that the manifest names, and what was encoded."""
        check_packs(manifest, store)
        check_content(manifest, store, packs={str(PackName(manifest.step, manifest.attempt, 0))})

    def end_save(self, problem: BaseException | None, manifest: Manifest | None, latest_step: int | None) -> None:
        """Nobody is there to be told."""

    def load(self, state: Stateful, manifest: Manifest, store: Store, optional: tuple[str, ...]) -> None:
        """One tensor after the other."""
        load_into(state, manifest, store, optional)

    def end_load(self, problem: BaseException | None, restored: Restored | None) -> None:
        """Nobody is there to be told."""


def write_own_share(job: SaveJob, store: Store, base: Manifest | None, *, rank: int) -> Share:
    """What this process writes of a checkpoint, in a pack of its own."""
    return write_share(
        store,
        PackName(job.request.step, job.by.attempt, rank),
        job.pieces,
        job.by,
        base=base,
        require_finite=job.require_finite,
        wrote=job.wrote,
    )
