"""The manifest: everything about one checkpoint, as a sealed JSON file. See `manifest_parse` for reading it.

Format 2; format 1 had neither bases nor thinned states. Later formats keep the seal, so that an older program can tell
a newer file from a damaged one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from dino_exp.checkpoint.canonical import metrics_to_json, seal
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.layout import parse_pack_name
from dino_exp.checkpoint.types import JSON, CheckpointInfo, Schedule
from dino_exp.errors import CorruptCheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMAT_VERSION = 2
BASES_KEY = "underlying"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One box of a tensor (`offset` and `shape`, one number for each dimension), and where its bytes are.

    `stored_bytes` bytes from `start` of `pack` are what `codec` made of the content. `bases` are the chunks of the same
    box that it was encoded against, as places in `Manifest.bases`.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    pack: str
    key: str
    start: int
    stored_bytes: int
    codec: str
    stored_digest: str
    content_digest: str
    bases: tuple[int, ...] = ()

    @property
    def num_elements(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One tensor: element type, global shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its content."""
        return math.prod(self.shape) * DTYPES[self.dtype].item_bytes


@dataclass(frozen=True, kw_only=True)
class PackEntry:
    """One pack file: its size, and its first bytes (safetensors length and header) with their digest."""

    name: str
    bytes: int
    header_bytes: int
    header_digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One checkpoint. Never changed after its commit.

    `record` is the caller's account of where the state comes from (run key, hashes, commit, configuration,
    parent, versions); `state` is JSON that a resume needs and `state_digest` covers; `aside` is JSON that
    it does not cover; `generators` holds the library generators of each rank. `state_digest` is None where
    tensors were written in pieces: then it is found by reading.

    `bases` describes what chunks were encoded against, each after those that it builds on itself, so that a manifest
    never depends on another manifest. `content_bytes` are those of all tensors before any codec.
    `full_state_digest` is that of the state of which only a part was kept; None while it is whole.
    """

    step: int
    epoch: int
    samples_seen: int
    created_at: str
    reasons: tuple[str, ...]
    attempt: int
    world_size: int
    tensors: Mapping[str, TensorEntry]
    bases: tuple[Chunk, ...] = ()
    content_bytes: int
    packs: tuple[PackEntry, ...]
    state: Mapping[str, JSON]
    state_digest: str | None
    full_state_digest: str | None = None
    record: Mapping[str, JSON] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    health: Mapping[str, JSON] = field(default_factory=dict)
    healthy: bool = True
    resumable: bool = True
    aside: Mapping[str, JSON] = field(default_factory=dict)
    generators: tuple[JSON, ...] = ()
    policy: JSON = field(default_factory=list)
    schedule: Schedule
    format_version: int = FORMAT_VERSION

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packs that it names."""
        return sum(pack.bytes for pack in self.packs)

    def info(self, *, verified: bool, num_bytes: int) -> CheckpointInfo:
        """The facts that policies see."""
        return CheckpointInfo(
            step=self.step,
            epoch=self.epoch,
            created_at=self.created_at,
            metrics=self.metrics,
            reasons=self.reasons,
            healthy=self.healthy,
            resumable=self.resumable,
            verified=verified,
            bytes=num_bytes,
        )


def chunks_of(manifest: Manifest) -> Iterator[tuple[str, TensorEntry, Chunk]]:
    """Every chunk with its tensor's name and entry, in the order of their places in the packs."""
    rows = [(name, entry, chunk) for name, entry in manifest.tensors.items() for chunk in entry.chunks]
    return iter(sorted(rows, key=lambda row: (row[2].pack, row[2].start, row[0])))


def chain_length(manifest: Manifest) -> int:
    """From how many saves a checkpoint needs packs, its own among them. (One save by several ranks writes several.)"""
    names = (parse_pack_name(pack.name) for pack in manifest.packs)
    return len({(name.step, name.attempt, name.generation) for name in names if name is not None})


MAX_CLOSURE = 256  # chunks that one may build on, directly or not: a block of each is held at once


def closure(chunk: Chunk, bases: Sequence[Chunk]) -> list[int]:
    """The places in `bases` that a chunk builds on, directly or not, ascending: each after its own.

    Raises CorruptCheckpointError for more than `MAX_CLOSURE`.
    """
    found: set[int] = set()
    wanted = list(chunk.bases)
    while wanted:
        place = wanted.pop()
        if place not in found:
            found.add(place)
            wanted += bases[place].bases
            if len(found) > MAX_CLOSURE:
                raise CorruptCheckpointError(f"{chunk.key[:80]!r} builds on more than {MAX_CLOSURE} chunks")
    return sorted(found)


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """The sealed file. Raises ValueError when a JSON part holds NaN."""
    body = {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}
    # Between `tensors` and `world_size`, where an index need not parse it (see `manifest_parse`).
    body[BASES_KEY] = {"chunks": [asdict(chunk) for chunk in body.pop("bases")]}
    body["tensors"] = {name: asdict(entry) for name, entry in manifest.tensors.items()}
    body["packs"] = [asdict(pack) for pack in manifest.packs]
    body["metrics"] = metrics_to_json(manifest.metrics)
    body["schedule"] = asdict(manifest.schedule)
    return seal(body)
