"""Decoded images in one file: what it looks like, and reading it.

The file, little-endian: a magic word; the length of a JSON text (8 bytes) and that text, which says of which listing,
size and decoder it is; an index of one `ENTRY` an image; the SHA-256 of all that; then, from a multiple of 4,096 bytes
on, the pixels of one image after the other, (3, H, W) each. An image without pixels could not be decoded.

The digest is checked when the file is opened, the checksum of an image's pixels whenever they are read. They are read
and not mapped: of a mapped file that is cut off, or on a failing disk, a signal ends the process without a word.
Shapes: N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dino_exp.data.files.decode import Pixels
from dino_exp.errors import DataError
from dino_exp.fsio import LOCAL, DamagedFileError, ReadHandle, parse_json

MAGIC = b"dino_exp canvas\n"
FORMAT = 1
ENTRY = np.dtype([("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("xxh3", "<u8")])
DIGEST_BYTES = 32
_PAGE = 4096
_MAX_JSON = 1 << 16
_AGAIN = "remove this file, and it is made again from the images"


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


class Canvases:
    """An opened cache. What becomes of the name of its file, or is put in its place, changes nothing here.

    It survives pickling: the file is opened anew where it is first read, and must have the same head and index, and so
    the same pixels.
    """

    def __init__(self, path: Path, made: Made, index_N: NDArray[Any], file: ReadHandle) -> None:
        self.path, self.index_N = path, index_N
        self._before_digest, self._digest = len(made.head()) + index_N.nbytes, head_digest(made.head(), index_N)
        self._file: ReadHandle | None = file
        self._keep(file)

    def __getstate__(self) -> dict[str, Any]:
        """All but the open file."""
        return {**self.__dict__, "_file": None}

    def missing(self) -> list[int]:
        """The images that could not be decoded."""
        return [int(number) for number in np.flatnonzero(self.index_N["height"] == 0)]

    def pixels(self, number: int) -> Pixels:
        """(3, H, W). Raises DataError where they are not what was written, or cannot be read."""
        entry = self.index_N[number]
        height, width = int(entry["height"]), int(entry["width"])
        pixels = np.empty(3 * height * width, np.uint8)
        file, what = self._file or self._open(), f"the pixels of image {number}"
        found = self._read(file, what, int(entry["offset"]), pixels.data)
        if not found or found < pixels.size or xxhash.xxh3_64_intdigest(pixels.data) != int(entry["xxh3"]):
            raise DataError(f"{self.path}: {what} are damaged; {_AGAIN}")
        return pixels.reshape(3, height, width)

    def _read(self, file: ReadHandle, what: str, offset: int, buffer: memoryview) -> int:
        try:
            return file.read_into(offset, buffer)
        except OSError as problem:
            raise DataError(f"{self.path}: {what} cannot be read ({problem.strerror}); {_AGAIN}") from problem

    def _open(self) -> ReadHandle:
        try:
            file = LOCAL.open_read(self.path)
        except (OSError, DamagedFileError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else "it is no regular file"
            raise DataError(
                f"{self.path}: the cache was there at the start, and cannot be opened now ({why}); start again, and it "
                "is made again where it is gone"
            ) from problem
        self._keep(file)
        digest = bytearray(DIGEST_BYTES)
        self._read(file, "head and index", self._before_digest, memoryview(digest))
        if digest != self._digest:
            raise DataError(
                f"{self.path}: another file than at the start: somebody made the cache anew meanwhile. Start again "
                "when that is over"
            )
        self._file = file
        return file

    def _keep(self, file: ReadHandle) -> None:
        weakref.finalize(self, file.close)
        file.expect_parts()  # images come in random order


def open_canvases(path: Path, made: Made) -> Canvases:
    """The cache that lies at `path`. Raises FileNotFoundError; DamagedFileError for one of another kind, or damaged."""
    file = LOCAL.open_read(path)
    try:
        return Canvases(path, made, _checked_index(file, path, made), file)
    except BaseException:
        file.close()
        raise


def _checked_index(file: ReadHandle, path: Path, made: Made) -> NDArray[Any]:
    head, num_bytes = made.head(), made.num_images * ENTRY.itemsize
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
    return index_N


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
