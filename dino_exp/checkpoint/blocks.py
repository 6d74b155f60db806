"""Chunks of codecs `zstd/1` and `delta/1`: blocks that are encoded each for itself, so that none needs much memory.

A block is four bytes of length and then: the way (see `residuals`), a bit for each base that it uses, the weights if
the way has any (eight bytes each), and byte planes. All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from dino_exp.checkpoint.choosing import Choice
from dino_exp.checkpoint.codec_names import RAW, check_codec
from dino_exp.checkpoint.digests import content_hasher
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.manifest import Chunk, closure
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.planes import WORD_TYPES, Words, pack_planes, unpack_planes
from dino_exp.checkpoint.residuals import LINEAR_TYPE, MAX_WEIGHTS, Way, add, subtract
from dino_exp.errors import CheckpointError, CorruptCheckpointError

BLOCK_BYTES = 1 << 20  # of content; part of the format
_MAX_WEIGHT = 16.0
_HEAD = struct.Struct("<BB")
_LENGTH = struct.Struct("<I")
_SPARE_BYTES = 1024  # of a block's head, weights and lengths of planes


def words_of(content: memoryview, item_bytes: int) -> Words:
    """Content as unsigned words, without a copy."""
    return np.frombuffer(content, WORD_TYPES[item_bytes])


def encode_block(words: Words, others: Sequence[Words], choice: Choice) -> list[bytes | memoryview]:
    """Buffers to be written one after the other. `others` are the blocks of the chunk's bases."""
    used = [others[place] for place in choice.needs]
    head = _HEAD.pack(choice.way, sum(1 << place for place in choice.needs))
    head += struct.pack(f"<{len(choice.weights)}d", *choice.weights)
    parts = [head, *pack_planes(subtract(choice.way, words, used, choice.weights))]
    return [_LENGTH.pack(sum(map(len, parts))), *parts]


def decode_block(stored: memoryview, others: Sequence[Words], dtype: str, words: Words) -> None:
    """Fill `words`; `stored` comes after the length. Raises CorruptCheckpointError."""
    way, used, weights, start = _parse_head(stored, others, dtype)
    left = np.empty_like(words)
    unpack_planes(stored[start:], left)
    words[:] = add(way, left, used, weights)


def _parse_head(stored: memoryview, others: Sequence[Words], dtype: str) -> tuple[Way, list[Words], list[float], int]:
    if len(stored) < _HEAD.size:
        raise CorruptCheckpointError("a block without a head")
    number, mask = _HEAD.unpack_from(stored)
    used = [other for place, other in enumerate(others) if mask >> place & 1]
    needed = {Way.XOR: 1, Way.DIFFERENCE: 1, Way.LINEAR: len(used) if 0 < len(used) <= MAX_WEIGHTS else -1}
    fits = number in list(Way) and mask >> len(others) == 0 and len(used) == needed.get(number, 0)
    if not fits or (number == Way.LINEAR and dtype != LINEAR_TYPE):
        raise CorruptCheckpointError(f"a block of way {number} with bases {mask:b} of {len(others)}")
    num_weights = len(used) if number == Way.LINEAR else 0
    end = _HEAD.size + 8 * num_weights
    if len(stored) < end:
        raise CorruptCheckpointError("a block without its weights")
    weights = list(struct.unpack_from(f"<{num_weights}d", stored, _HEAD.size))
    if not all(abs(weight) <= _MAX_WEIGHT for weight in weights):
        raise CorruptCheckpointError("a weight out of range")
    return Way(number), used, weights, end


class _StoredBlocks:
    """The bytes of one chunk in a pack, read from its beginning to its end and digested on the way."""

    def __init__(self, packs: PackReader, chunk: Chunk, dtype: str, item_bytes: int) -> None:
        check_codec(chunk.codec)
        self._handle = packs.handle(chunk.pack)
        self._chunk, self._dtype = chunk, dtype
        self._at, self._hasher = 0, content_hasher()
        if chunk.codec == RAW and chunk.stored_bytes != chunk.num_elements * item_bytes:
            raise CorruptCheckpointError(f"{chunk.key} in {chunk.pack}: {chunk.stored_bytes} raw bytes are too few")

    def read_block(self, others: Sequence[Words], words: Words) -> None:
        """Fill `words` with the next block. `others` are the same blocks of the chunk's bases."""
        if self._chunk.codec == RAW:
            words[:] = np.frombuffer(self._next(words.nbytes), words.dtype)
            return
        (length,) = _LENGTH.unpack(self._next(_LENGTH.size))
        if length > words.nbytes + _SPARE_BYTES:
            raise CorruptCheckpointError(f"{self._chunk.key} in {self._chunk.pack}: a block of {length} bytes")
        decode_block(self._next(length), others, self._dtype, words)

    def finish(self) -> None:
        """Raise CorruptCheckpointError unless all that was read is what was written."""
        if self._at != self._chunk.stored_bytes or self._hasher.hexdigest() != self._chunk.stored_digest:
            raise CorruptCheckpointError(
                f"{self._chunk.key} in {self._chunk.pack}: digest {self._hasher.hexdigest()[:8]}… of {self._at} bytes "
                f"at {self._chunk.start}, expected {self._chunk.stored_digest[:8]}… of {self._chunk.stored_bytes}"
            )

    def _next(self, num_bytes: int) -> memoryview:
        if self._at + num_bytes > self._chunk.stored_bytes:
            raise CorruptCheckpointError(f"{self._chunk.key} in {self._chunk.pack}: it ends within a block")
        data = memoryview(bytearray(num_bytes))
        num = self._handle.read_into(self._chunk.start + self._at, data)
        self._hasher.update(data[:num])
        self._at += num
        if num != num_bytes:
            raise CorruptCheckpointError(f"{self._chunk.key} in {self._chunk.pack}: the file ends within it")
        return data


def read_blocks(
    packs: PackReader, wanted: Sequence[Chunk], bases: Sequence[Chunk], dtype: str, item_bytes: int
) -> Iterator[list[Words]]:
    """The content of one or more chunks of the same box, block by block: for each block one array a chunk.

    Everything that they build on is read along with them, once, and its digests are checked at the end: what was
    yielded counts only when the iterator has ended. Raises CorruptCheckpointError, UnsupportedFormatError, OSError.
    """
    places = sorted({place for chunk in wanted for place in closure(chunk, bases)})
    order = dict.fromkeys([*(bases[place] for place in places), *wanted])  # each once, after what it builds on
    readers = {chunk: _StoredBlocks(packs, chunk, dtype, item_bytes) for chunk in order}
    left = wanted[0].num_elements
    while left > 0:
        num = min(left, BLOCK_BYTES // item_bytes)
        left -= num
        held: dict[Chunk, Words] = {}
        for chunk, reader in readers.items():
            held[chunk] = np.empty(num, WORD_TYPES[item_bytes])
            reader.read_block([held[bases[place]] for place in chunk.bases], held[chunk])
        yield [held[chunk] for chunk in wanted]
    for reader in readers.values():
        reader.finish()


def buffer_of(chunk: Chunk, dtype: str) -> memoryview:
    """Memory for a chunk's content. Raises CheckpointError where there is not so much."""
    try:  # not a bytearray, which is filled with zeros first: that takes as long as reading
        return np.empty(chunk.num_elements * DTYPES[dtype].item_bytes, np.uint8).data
    except (MemoryError, OverflowError, ValueError) as problem:
        raise CheckpointError(f"{chunk.key}: {dtype} {list(chunk.shape)} does not fit into memory") from problem


def load_content(packs: PackReader, chunk: Chunk, bases: Sequence[Chunk], dtype: str, into: memoryview) -> None:
    """Fill `into`, as long as the chunk's content, and check it. Raises as `read_blocks`."""
    if chunk.codec == RAW:
        packs.read_stored(chunk, into)
        return
    hasher, at = content_hasher(), 0
    for (words,) in read_blocks(packs, [chunk], bases, dtype, DTYPES[dtype].item_bytes):
        block = into[at : at + words.nbytes]
        block[:] = words.view(np.uint8).data
        hasher.update(block)
        at += words.nbytes
    if hasher.hexdigest() != chunk.content_digest:
        raise CorruptCheckpointError(f"{chunk.key} in {chunk.pack}: the digest of its content differs")
