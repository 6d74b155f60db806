"""Codecs: lossless transforms between a chunk's content and the bytes that a pack stores.

A manifest records for each chunk the codec by name and version. A codec that needs a base (a delta) gets
the content of the chunk's `base`; the others get None.
"""

from __future__ import annotations

from typing import Protocol

from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import CorruptCheckpointError

RAW = "raw/1"


class Codec(Protocol):
    """One transform. `item_bytes` is the size of an element, for codecs that separate byte planes."""

    name: str

    def encode(self, content: memoryview, item_bytes: int, base: memoryview | None) -> memoryview:
        """The bytes to store."""

    def decode(self, stored: memoryview, item_bytes: int, base: memoryview | None, into: memoryview) -> None:
        """Fill `into`, which has the content's exact size. Raises CorruptCheckpointError when that fails."""


class RawCodec:
    """Content as it is."""

    name = RAW

    def encode(self, content: memoryview, item_bytes: int, base: memoryview | None) -> memoryview:
        """See `Codec`; no copy is made."""
        return content

    def decode(self, stored: memoryview, item_bytes: int, base: memoryview | None, into: memoryview) -> None:
        """See `Codec`."""
        if len(stored) != len(into):
            raise CorruptCheckpointError(f"codec {RAW}: {len(stored)} bytes stored, expected {len(into)}")
        into[:] = stored


CODECS: dict[str, Codec] = {codec.name: codec for codec in (RawCodec(),)}


def find_codec(name: str) -> Codec:
    """The codec of that name and version. Raises UnsupportedFormatError naming those that are known here."""
    if name not in CODECS:
        raise UnsupportedFormatError(
            f"codec {name!r} is unknown here, expected one of {', '.join(CODECS)}; it was written by a newer "
            "version, so install that one to read it"
        )
    return CODECS[name]
