"""The tensors of a checkpoint as numpy arrays, one at a time: for those who look, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_exp.checkpoint.blocks import buffer_of, load_content
from dino_exp.checkpoint.codec_names import check_codec
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.manifest import Chunk, TensorEntry
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.store import Store
from dino_exp.errors import CheckpointError

Array = NDArray[Any]


class OpenCheckpoint:
    """One checkpoint, read tensor by tensor. To be used as a context manager.

    Raises CorruptCheckpointError, FileNotFoundError for a step that is not there, UnsupportedFormatError, OSError.
    """

    def __init__(self, store: Store, step: int) -> None:
        self.manifest, self.identity = store.read(step)
        self._packs = PackReader(store.files, store.packs_folder, self.manifest.packs)

    def expect_all(self) -> None:
        """All tensors will be loaded: let the disk begin. Raises CorruptCheckpointError for a missing pack, OSError."""
        for pack in self.manifest.packs:
            self._packs.handle(pack.name).expect_all()

    def load(self, name: str) -> Array:
        """A tensor of the manifest, decoded and checked; bfloat16 as float32.

        Raises CorruptCheckpointError, OSError, and CheckpointError for a type that numpy has not.
        """
        entry = self.manifest.tensors[name]
        return as_numbers(load_words(self._packs, entry, self.manifest.bases), entry.dtype, name)

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *failure: object) -> None:
        self._packs.__exit__(*failure)


def load_words(packs: PackReader, entry: TensorEntry, bases: Sequence[Chunk]) -> Array:
    """A whole tensor as elements of raw bytes, in its shape. Raises CorruptCheckpointError, OSError."""
    item = np.dtype((np.void, DTYPES[entry.dtype].item_bytes))
    for chunk in entry.chunks:  # as long as the manifest says, before memory is taken on its word
        check_codec(chunk.codec)
        packs.handle(chunk.pack)
    if len(entry.chunks) == 1:
        return _load_chunk(packs, entry.chunks[0], bases, entry.dtype).reshape(entry.shape)
    whole = np.empty(entry.shape, item)
    for chunk in entry.chunks:
        box = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.shape, strict=True))
        whole[box] = _load_chunk(packs, chunk, bases, entry.dtype)
    return whole


def _load_chunk(packs: PackReader, chunk: Chunk, bases: Sequence[Chunk], dtype: str) -> Array:
    content = buffer_of(chunk, dtype)
    load_content(packs, chunk, bases, dtype, content)
    return np.frombuffer(content, np.dtype((np.void, DTYPES[dtype].item_bytes))).reshape(chunk.shape)


def as_numbers(words: Array, dtype: str, name: str) -> Array:
    """Elements of raw bytes as the numbers that they stand for. Raises CheckpointError for a type numpy has not."""
    flat = np.ascontiguousarray(words).reshape(-1)
    if dtype == "bfloat16":  # the upper half of a float32
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(words.shape)
    try:
        return flat.view(np.dtype(dtype)).reshape(words.shape)
    except TypeError as problem:
        raise CheckpointError(f"{name}: values of type {dtype} cannot be measured") from problem
