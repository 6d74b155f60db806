"""Checking every byte that a manifest names, in bounded memory and without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dino_exp.checkpoint.codec import find_codec
from dino_exp.checkpoint.digests import state_digest
from dino_exp.checkpoint.manifest import Chunk, Manifest, chunks_of
from dino_exp.checkpoint.pack import BLOCK_BYTES, PackReader
from dino_exp.errors import CorruptCheckpointError
from dino_exp.fsio import Files


@dataclass(frozen=True)
class Damage:
    """One damaged place: a tensor, or a whole pack or manifest when `tensor` is None."""

    tensor: str | None
    pack: str | None
    reason: str


def find_damage(
    manifest: Manifest, files: Files, packs_folder: Path, progress: Callable[[int], None] | None = None
) -> Iterator[Damage]:
    """Each damaged pack and tensor, as it is found. `progress` hears of bytes read.

    Raises OSError when reading fails in a way that says nothing about the bytes (EIO, EACCES), and
    UnsupportedFormatError for a codec that this version does not know.
    """
    buffer = memoryview(bytearray(BLOCK_BYTES))
    if manifest.state_digest not in (None, whole_state_digest(manifest)):
        yield Damage(None, None, "the digest of the state does not fit the tensors and JSON that it covers")
    with PackReader(files, packs_folder, manifest.packs) as packs:
        for pack in manifest.packs:
            problem = _problem(partial(packs.check_header, pack.name))
            if problem is not None:
                yield Damage(None, pack.name, problem)
        for name, _, chunk in chunks_of(manifest):
            for part in _with_bases(chunk):
                find_codec(part.codec)
                problem = _problem(partial(packs.check_stored, part, buffer))
                if problem is not None:
                    yield Damage(name, part.pack, problem)
            if progress is not None:
                progress(chunk.stored_bytes)


def whole_state_digest(manifest: Manifest) -> str | None:
    """The digest of the state from the manifest alone; None where a tensor was written in pieces."""
    if any(len(entry.chunks) != 1 for entry in manifest.tensors.values()):
        return None
    rows = (
        (name, entry.dtype, entry.shape, entry.chunks[0].content_digest) for name, entry in manifest.tensors.items()
    )
    return state_digest(rows, manifest.state)


def _with_bases(chunk: Chunk | None) -> Iterator[Chunk]:
    while chunk is not None:
        yield chunk
        chunk = chunk.base


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CorruptCheckpointError as damage:
        return str(damage)
    return None
