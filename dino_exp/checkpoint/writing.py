"""From a live state to a pack and the manifest that describes it. Nothing is committed here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dino_exp.checkpoint.base import Base
from dino_exp.checkpoint.bases import BaseList
from dino_exp.checkpoint.canonical import check_json, is_number
from dino_exp.checkpoint.encoding import Encoder, Plain, order, packs_reached
from dino_exp.checkpoint.finite import is_finite
from dino_exp.checkpoint.layout import MAX_STEP, PackName
from dino_exp.checkpoint.manifest import Chunk, Manifest, PackEntry, TensorEntry
from dino_exp.checkpoint.manifest_parse import MAX_BYTES, MAX_TEXT
from dino_exp.checkpoint.pack import Key, write_pack
from dino_exp.checkpoint.pieces import Piece
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.tensors import dtype_name, tensor_bytes
from dino_exp.checkpoint.types import JSON, CheckpointInfo, Schedule
from dino_exp.checkpoint.verify import whole_state_digest
from dino_exp.errors import CheckpointError

_BYTES_PER_TENSOR = 1000  # of manifest and header: an estimate, for a look at the free space
_BYTES_BESIDE = 100_000


class NonFiniteStateError(CheckpointError):
    """A state that must be finite is not: nothing of it was committed."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} holds NaN or infinity, so this state is not saved")
        self.name = name


@dataclass(frozen=True, kw_only=True)
class SaveRequest:
    """What to write down with a state, frozen when the save is decided.

    `record` says where the state comes from (its `config_hash`, `git_commit` and `code_id` key the registry);
    `aside` is kept with the state and not covered by its digest (clocks, hosts).
    """

    step: int
    epoch: int
    schedule: Schedule
    samples_seen: int = 0
    reasons: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    health: Mapping[str, JSON] = field(default_factory=dict)
    healthy: bool = True
    record: Mapping[str, JSON] = field(default_factory=dict)
    aside: Mapping[str, JSON] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, most in (
            ("step", self.step, MAX_STEP),
            ("epoch", self.epoch, MAX_STEP),
            ("samples_seen", self.samples_seen, MAX_BYTES),
            ("schedule.horizon_steps", self.schedule.horizon_steps, MAX_BYTES),
            ("schedule.steps_per_epoch", self.schedule.steps_per_epoch, MAX_BYTES),
        ):
            if not 0 <= value <= most:
                raise CheckpointError(f"a save needs 0 <= {name} <= {most}, got {value}")
        for reason in self.reasons:
            if len(reason) > MAX_TEXT:
                raise CheckpointError(f"a reason to save has {len(reason)} characters, expected at most {MAX_TEXT}")
        for name in ("record", "health", "aside"):
            check_json(dict(getattr(self, name)), name)
        for metric, number in self.metrics.items():
            if not is_number(number):
                raise CheckpointError(
                    f"metric {metric}: found {type(number).__name__}, expected a number of a float's range"
                )

    def info(self) -> CheckpointInfo:
        """What policies will see of it once it is there."""
        return CheckpointInfo(
            step=self.step, epoch=self.epoch, metrics=self.metrics, reasons=self.reasons, healthy=self.healthy
        )


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who writes, and how: the attempt, the policy in force, the clock (seconds since 1970), the storage."""

    attempt: int
    policy: JSON
    now_secs: float
    generators: JSON
    storage: Storage


def split_state(given: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Tensors and JSON values of a flat state. Raises CheckpointError for any other value or name."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, JSON] = {}
    for name, value in given.items():
        if not isinstance(name, str) or not 0 < len(name) <= 1000 or name == "__metadata__":
            raise CheckpointError(f"{str(name)[:80]!r} cannot name a part of a state")
        if isinstance(value, Tensor):
            if value.layout != torch.strided:
                raise CheckpointError(f"{name} is of the layout {value.layout}, and only torch.strided can be saved")
            tensors[name] = value
        else:
            check_json(value, name)
            values[name] = value
    return tensors, values


def bytes_needed(tensors: Iterable[Tensor], storage: Storage) -> int:
    """How much room a checkpoint of these tensors takes on the disk at least; nobody knows what encoding leaves."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    return (sum(sizes) if storage.codec == "raw" else 0) + _BYTES_PER_TENSOR * len(sizes) + _BYTES_BESIDE


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process wrote of a checkpoint: the tensors, or parts of them, of which it has the chunks."""

    tensors: Mapping[str, TensorEntry]
    bases: tuple[Chunk, ...]
    packs: tuple[PackEntry, ...]
    generators: JSON


def write_share(
    store: Store,
    pack_name: PackName,
    pieces: Mapping[Piece, Tensor],
    by: Writer,
    *,
    base: Manifest | None = None,
    require_finite: bool = False,
    wrote: Callable[[int], None] | None = None,
) -> Share:
    """Write one synced pack with all pieces. `wrote` hears of bytes written.

    `base` is a checkpoint in the same folder that it may be written against. Where everything is there already, no
    pack is left.

    Raises NonFiniteStateError where a number must be finite and is not, UnusableBaseError, CheckpointError, OSError.
    """
    keys = {
        piece: Key(piece.label, dtype_name(tensor, piece.name), tuple(tensor.shape)) for piece, tensor in pieces.items()
    }
    ordered = sorted(keys, key=lambda piece: order(piece.name, keys[piece].dtype, piece.offset, by.storage))
    plain = (  # one at a time: some are copied for it
        Plain(piece.name, keys[piece], tensor_bytes(pieces[piece]), piece.offset) for piece in ordered
    )
    checked = map(_check_finite, plain) if require_finite else plain
    with contextlib.ExitStack() as stack:
        opened = None if base is None else stack.enter_context(Base(base, store))
        pool = stack.enter_context(ThreadPoolExecutor(by.storage.threads)) if by.storage.threads else None
        encoder = Encoder(by.storage, opened, pool)
        packs = write_pack(
            store, pack_name, [keys[piece] for piece in ordered], partial(encoder.write, tensors=checked), wrote
        )
    tensors: dict[str, TensorEntry] = {}
    for piece in ordered:
        before = tensors[piece.name].chunks if piece.name in tensors else ()
        chunks = (*before, encoder.chunks[piece.label])
        tensors[piece.name] = TensorEntry(dtype=keys[piece].dtype, shape=piece.whole, chunks=chunks)
    return Share(tensors=tensors, bases=tuple(encoder.bases.chunks), packs=tuple(packs), generators=by.generators)


def describe(
    shares: Sequence[Share], values: Mapping[str, JSON], request: SaveRequest, by: Writer, base: Manifest | None
) -> Manifest:
    """The manifest to commit: of what all processes wrote, in the order of their ranks."""
    bases = BaseList()
    tensors: dict[str, TensorEntry] = {}
    for share in shares:
        for name, entry in share.tensors.items():
            before = tensors[name].chunks if name in tensors else ()
            chunks = (*before, *(bases.adopt(chunk, share.bases) for chunk in entry.chunks))
            tensors[name] = replace(entry, chunks=chunks)
    reached = packs_reached(tensors, bases.chunks)
    earlier = () if base is None else (pack for pack in base.packs if pack.name in reached)
    made = Manifest(
        step=request.step,
        epoch=request.epoch,
        samples_seen=request.samples_seen,
        created_at=datetime.fromtimestamp(by.now_secs, UTC).isoformat(timespec="milliseconds"),
        reasons=request.reasons,
        attempt=by.attempt,
        world_size=len(shares),
        tensors=tensors,
        bases=tuple(bases.chunks),
        content_bytes=sum(entry.num_bytes for entry in tensors.values()),
        packs=(*(pack for share in shares for pack in share.packs), *earlier),
        state=dict(values),
        state_digest=None,
        record=dict(request.record),
        metrics=dict(request.metrics),
        health=dict(request.health),
        healthy=request.healthy,
        aside=dict(request.aside),
        generators=tuple(share.generators for share in shares),
        policy=by.policy,
        schedule=request.schedule,
    )
    return replace(made, state_digest=whole_state_digest(made))


def _check_finite(tensor: Plain) -> Plain:
    if not is_finite(tensor.content, tensor.key.dtype):
        raise NonFiniteStateError(tensor.name)
    return tensor
