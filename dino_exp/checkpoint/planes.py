"""Words of numbers as byte planes, each compressed for itself.

The bytes of a float that stand for sign and exponent repeat, those of the mantissa are noise. Apart from each other the
former compress well and the latter are stored as they are, at no cost in time.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from dino_exp.errors import CorruptCheckpointError

Words: TypeAlias = npt.NDArray[Any]  # unsigned whole numbers, as wide as an element

WORD_TYPES: dict[int, np.dtype[Any]] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
# Long matches only, looked up in a small table: planes hold runs at most, and what helps is the entropy coder.
# Smaller and half as fast again as plain level 1 on states of real trainings.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=10)
_AS_IT_IS = 1 << 31  # set in a plane's length: not compressed


def pack_planes(words: Words) -> list[bytes | memoryview]:
    """Planes from the most significant byte down, each behind its length; buffers to be written in this order."""
    width, compressor = words.itemsize, zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    by_byte = words.view(np.uint8).reshape(-1, width)
    parts: list[bytes | memoryview] = []
    for at in reversed(range(width)):
        plane = np.ascontiguousarray(by_byte[:, at])
        packed = compressor.compress(plane.data)
        if len(packed) < len(plane):
            parts += [struct.pack("<I", len(packed)), packed]
        else:
            parts += [struct.pack("<I", len(plane) | _AS_IT_IS), plane.data]
    return parts


def unpack_planes(stored: memoryview, words: Words) -> None:
    """Fill `words`. Raises CorruptCheckpointError for anything that `pack_planes` would not have made of as many."""
    width, num, at = words.itemsize, len(words), 0
    by_byte = words.view(np.uint8).reshape(-1, width)
    decompressor = zstandard.ZstdDecompressor()
    for plane in reversed(range(width)):
        if len(stored) < at + 4:
            raise CorruptCheckpointError("a block ends before its planes")
        (length,) = struct.unpack_from("<I", stored, at)
        at, size = at + 4, length & ~_AS_IT_IS
        piece = stored[at : at + size]
        if len(piece) != size or (length & _AS_IT_IS and size != num):
            raise CorruptCheckpointError(f"a plane of {size} bytes, expected {num} or fewer that are there")
        by_byte[:, plane] = np.frombuffer(piece if length & _AS_IT_IS else _inflate(decompressor, piece, num), np.uint8)
        at += size
    if at != len(stored):
        raise CorruptCheckpointError(f"{len(stored) - at} bytes behind the last plane of a block")


def _inflate(decompressor: zstandard.ZstdDecompressor, piece: memoryview, num: int) -> bytes:
    try:
        if zstandard.frame_content_size(piece) != num:  # before memory is taken on its word
            raise CorruptCheckpointError(f"a plane that is not of {num} bytes")
        inflated = decompressor.decompress(piece, max_output_size=num)
    except zstandard.ZstdError as problem:
        raise CorruptCheckpointError(f"a plane that zstd does not take: {problem}") from problem
    if len(inflated) != num:
        raise CorruptCheckpointError(f"a plane of {len(inflated)} bytes, expected {num}")
    return inflated
