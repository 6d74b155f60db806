"""Reading a checkpoint into tensors that may be sharded: DCP plans what each rank needs, we read and check it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from dino_exp.checkpoint.manifest import Manifest, TensorEntry
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.tensors import load_chunk


@torch.no_grad()
def load_parts(targets: Mapping[str, Tensor], manifest: Manifest, store: Store) -> None:
    """Fill tensors, or this rank's parts of sharded ones, with what the checkpoint holds under their names.

    However many processes wrote it under whatever sharding. Only chunks that overlap with what is wanted are read, and
    each is checked. Raises CorruptCheckpointError, OSError.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    described: dict[str, STORAGE_TYPES] = {name: _describe(manifest.tensors[name]) for name in targets}
    planner.set_up_planner(dict(targets), Metadata(described), is_coordinator=True)
    (plan,) = planner.create_global_plan([planner.create_local_plan()])
    items = sorted(planner.finish_plan(plan).items, key=_source)
    with PackReader(store.files, store.packs_folder, manifest.packs) as packs:
        for (name, place), wanted in groupby(items, key=_source):
            entry = manifest.tensors[name]
            content = load_chunk(packs, entry.chunks[place], manifest.bases, entry.dtype)
            for item in wanted:
                part = content[_box(item.storage_offsets, item.lengths)]
                planner.resolve_tensor(item).copy_(part)


def _describe(entry: TensorEntry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(getattr(torch, entry.dtype)), torch.Size(entry.shape), chunks)


def _source(item: ReadItem) -> tuple[str, int]:
    """Which chunk of which tensor an item reads from."""
    assert item.storage_index.index is not None
    return item.storage_index.fqn, item.storage_index.index


def _box(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
