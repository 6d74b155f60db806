"""Between torch tensors and bytes. The only module of the reading side that imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_exp.checkpoint.blocks import load_content
from dino_exp.checkpoint.codec_names import check_codec
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.manifest import Chunk, Manifest, TensorEntry
from dino_exp.checkpoint.pack import PackReader
from dino_exp.errors import CheckpointError


def dtype_name(tensor: Tensor, name: str) -> str:
    """The manifest's name of its element type. Raises CheckpointError for a type or layout that has none."""
    text = str(tensor.dtype).removeprefix("torch.")
    if text not in DTYPES or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{name}: a {tensor.layout} tensor of {tensor.dtype} cannot be saved, expected a dense one of "
            + ", ".join(DTYPES)
        )
    return text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Row-major bytes on the host. Copies only what is on a device or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def load_tensor(packs: PackReader, entry: TensorEntry, bases: Sequence[Chunk] = ()) -> Tensor:
    """Read, decode and check one tensor, on the CPU. `bases` are those of its manifest.

    Raises CorruptCheckpointError, UnsupportedFormatError, OSError.
    """
    dtype = getattr(torch, entry.dtype)
    for chunk in entry.chunks:  # before memory is taken for all of them
        check_codec(chunk.codec)
        packs.handle(chunk.pack)
    if len(entry.chunks) == 1:
        return load_chunk(packs, entry.chunks[0], bases, entry.dtype)
    whole = _empty(entry.shape, dtype)
    for chunk in entry.chunks:
        sides = zip(chunk.offset, chunk.shape, strict=True)
        box = tuple(slice(start, start + size) for start, size in sides)
        whole[box] = load_chunk(packs, chunk, bases, entry.dtype)
    return whole


def load_chunk(packs: PackReader, chunk: Chunk, bases: Sequence[Chunk], dtype: str) -> Tensor:
    """Read, decode and check one box of a tensor. Raises as `load_tensor`."""
    check_codec(chunk.codec)
    packs.handle(chunk.pack)  # as long as the manifest says, before memory is taken on its word
    content = _empty(chunk.shape, getattr(torch, dtype))
    into = tensor_bytes(content)  # shares memory: the tensor is contiguous and on the host
    load_content(packs, chunk, bases, dtype, into)
    return content


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as problem:
        raise CheckpointError(f"a tensor of {dtype} {list(shape)} does not fit into memory") from problem


class SavedState(Mapping[str, Any]):
    """A checkpoint's state by name: JSON values at once, each tensor read and checked when it is asked for.

    So a restore needs memory for one tensor at a time. A tensor asked for twice is read twice.
    """

    def __init__(self, manifest: Manifest, packs: PackReader) -> None:
        self._manifest, self._packs = manifest, packs

    def __getitem__(self, name: str) -> Any:
        entry = self._manifest.tensors.get(name)
        if entry is None:
            return self._manifest.state[name]
        return load_tensor(self._packs, entry, self._manifest.bases)

    def __iter__(self) -> Iterator[str]:
        yield from self._manifest.tensors
        yield from self._manifest.state

    def __len__(self) -> int:
        return len(self._manifest.tensors) + len(self._manifest.state)

    def __contains__(self, name: object) -> bool:
        return name in self._manifest.tensors or name in self._manifest.state
