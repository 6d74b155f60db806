"""Who writes which part of a state: DCP's planner, with large tensors that all ranks hold cut into rows first.

Sharded tensors are written as they lie; what every rank holds is divided by size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from dino_exp.checkpoint.pieces import Piece

_LARGEST_SHARE = 1 / 8  # of what one rank writes on average: no tensor that all hold weighs more in a plan


class SharePlanner(DefaultSavePlanner):
    """Plans for `num_ranks` processes; the heaviest part of all goes first to whoever has least."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._num_ranks = num_ranks

    def create_local_plan(self) -> SavePlan:
        """What this rank could write: its shards, and all that every rank holds."""
        plan = super().create_local_plan()
        replicated = sum(_num_bytes(item) for item in plan.items if item.type == WriteItemType.TENSOR)
        most_bytes = math.ceil(replicated / self._num_ranks * _LARGEST_SHARE)
        items = [part for item in plan.items for part in _cut(item, most_bytes) if _is_worth_writing(part)]
        items.sort(key=lambda item: (-_num_bytes(item), item.index.fqn, _offset(item)))
        self.plan = replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The part of a live tensor that an item stands for."""
        tensor = self.state_dict[index.fqn]
        if hasattr(tensor, "to_local"):
            return super().lookup_object(index)
        return tensor


def part_of(planner: SharePlanner, item: WriteItem) -> tuple[Piece, Tensor]:
    """The live tensor of an item of a finished plan, and which box it is."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    with torch.no_grad():
        tensor = planner.lookup_object(item.index).detach()
    if tensor.shape != chunk.sizes:  # of a tensor that lies here whole
        tensor = tensor[
            tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        ]
    name = item.index.fqn
    return Piece(name, tuple(chunk.offsets), tuple(item.tensor_data.size), name), tensor


def labelled(parts: Sequence[tuple[Piece, Tensor]]) -> dict[Piece, Tensor]:
    """The same under keys that are unique in a pack: a tensor's own name where one part of it is there."""
    numbers = Counter(piece.name for piece, _ in parts)
    return {
        piece
        if numbers[piece.name] == 1
        else replace(piece, label=f"{piece.name}#{'.'.join(map(str, piece.offset))}"): tensor
        for piece, tensor in parts
    }


def layout_of(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What a plan depends on."""
    return tuple((name, tensor.dtype, tensor.shape, _local_shape(tensor)) for name, tensor in tensors.items())


def _local_shape(tensor: Tensor) -> torch.Size:
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    with torch.no_grad():
        return tensor.shape if to_local is None else to_local().shape


def _cut(item: WriteItem, most_bytes: int) -> Iterator[WriteItem]:
    """An item for a tensor that all ranks hold, in rows of at most so many bytes; any other as it is."""
    size = _num_bytes(item)
    if item.type != WriteItemType.TENSOR or size <= most_bytes or item.tensor_data is None:
        yield item
        return
    data = item.tensor_data
    num_rows, rest = data.size[0], data.size[1:]
    num_parts = min(num_rows, math.ceil(size / most_bytes))
    for part in range(num_parts):
        first, end = part * num_rows // num_parts, (part + 1) * num_rows // num_parts
        offsets, sizes = torch.Size([first, *[0] * len(rest)]), torch.Size([end - first, *rest])
        yield replace(
            item,
            index=MetadataIndex(item.index.fqn, offsets),
            type=WriteItemType.SHARD,
            tensor_data=replace(data, chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes)),
        )


def _is_worth_writing(item: WriteItem) -> bool:
    """Whether it holds anything: a rank may have no row of a sharded tensor."""
    assert item.tensor_data is not None
    return item.type == WriteItemType.TENSOR or math.prod(item.tensor_data.chunk.sizes) > 0


def _num_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _offset(item: WriteItem) -> tuple[int, ...]:
    assert item.tensor_data is not None
    return tuple(item.tensor_data.chunk.offsets)
