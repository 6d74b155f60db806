"""Decoded images in one file that is mapped into memory: what it looks like, and reading it.

The file, little-endian: a magic word; the length of a JSON text (8 bytes) and that text, which says of which listing,
size and decoder it is; an index of one `ENTRY` an image; the SHA-256 of all that; then, from a multiple of 4,096 bytes
on, the pixels of one image after the other, (3, H, W) each. An image without pixels could not be decoded.

The digest is checked when the file is opened, the checksum of an image's pixels whenever they are read.
Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dino_exp.data.files.decode import Pixels
from dino_exp.errors import DataError
from dino_exp.fsio import LOCAL, DamagedFileError, parse_json

MAGIC = b"dino_exp canvas\n"
FORMAT = 1
ENTRY = np.dtype([("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("xxh3", "<u8")])
DIGEST_BYTES = 32
_PAGE = 4096
_MAX_JSON = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a cache is made of and how: with another of these it is another cache."""

    listing: str  # its digest
    num_images: int
    decode_size: int
    decoder: str

    def head(self) -> bytes:
        """The bytes before the index."""
        text = json.dumps({"format_version": FORMAT, **vars(self)}, sort_keys=True).encode()
        return MAGIC + len(text).to_bytes(8, "little") + text

    def pixels_start(self) -> int:
        """Where the pixels begin."""
        before = len(self.head()) + self.num_images * ENTRY.itemsize + DIGEST_BYTES
        return -(-before // _PAGE) * _PAGE


def head_digest(head: bytes, index_N: NDArray[Any]) -> bytes:
    """The SHA-256 that stands after the index."""
    return hashlib.sha256(head + index_N.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class Canvases:
    """An opened cache. It survives pickling: the file is mapped anew where it is first read."""

    path: Path
    index_N: NDArray[Any]
    _map: list[mmap.mmap] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "index_N": self.index_N, "_map": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def missing(self) -> list[int]:
        """The images that could not be decoded."""
        return [int(number) for number in np.flatnonzero(self.index_N["height"] == 0)]

    def pixels(self, number: int) -> Pixels:
        """(3, H, W), read-only. Raises DataError where they are not what was written."""
        entry = self.index_N[number]
        height, width, start = int(entry["height"]), int(entry["width"]), int(entry["offset"])
        block = memoryview(self._mapped())[start : start + 3 * height * width]
        if not len(block) or xxhash.xxh3_64_intdigest(block) != int(entry["xxh3"]):
            raise DataError(
                f"{self.path}: the pixels of image {number} are damaged; remove this file, and it is made again from "
                "the images"
            )
        return np.frombuffer(block, np.uint8).reshape(3, height, width)

    def _mapped(self) -> mmap.mmap:
        if not self._map:
            with open(self.path, "rb") as file:  # noqa: PTH123
                self._map.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._map[0].madvise(mmap.MADV_RANDOM)  # images come in random order: do not read ahead
        return self._map[0]


def open_canvases(path: Path, made: Made) -> Canvases:
    """The cache that lies at `path`. Raises FileNotFoundError; DamagedFileError for one of another kind, or damaged."""
    head, num_bytes = made.head(), made.num_images * ENTRY.itemsize
    with LOCAL.open_read(path) as file:
        found = bytearray(len(head) + num_bytes + DIGEST_BYTES)
        num = file.read_into(0, memoryview(found))
        if bytes(found[: len(head)]) != head:
            raise DamagedFileError(f"{path}: {_what(bytes(found))}")
        if num < len(found):
            raise DamagedFileError(f"{path}: it ends after {num} bytes")
        index_N = np.frombuffer(bytes(found[len(head) : len(head) + num_bytes]), ENTRY)
        if head_digest(head, index_N) != bytes(found[-DIGEST_BYTES:]):
            raise DamagedFileError(f"{path}: its index is damaged")
        end = int((index_N["offset"] + 3 * index_N["height"].astype(np.uint64) * index_N["width"]).max(initial=0))
        if file.num_bytes != max(end, made.pixels_start()):
            raise DamagedFileError(f"{path}: has {file.num_bytes} bytes, expected {max(end, made.pixels_start())}")
    return Canvases(path, index_N)


def _what(found: bytes) -> str:
    """What a file is that is not the cache looked for."""
    if not found.startswith(MAGIC):
        return "it is no cache of images"
    start = len(MAGIC) + 8
    length = int.from_bytes(found[len(MAGIC) : start], "little")
    if length > min(_MAX_JSON, len(found) - start):
        return "its head is damaged"
    try:
        said = parse_json(found[start : start + length], "its head", max_depth=2)
    except DamagedFileError as damage:
        return str(damage)
    return f"it was made by or of something else: {json.dumps(said)[:300]}"
