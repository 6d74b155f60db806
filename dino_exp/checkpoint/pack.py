"""Packs: safetensors files written in one pass, and read by the manifest's offsets alone.

The file's header is reserved from an upper bound, left as zeros, and filled in last, padded with spaces: a
torn pack has no header. The data area starts at a multiple of 64 bytes; the format forbids gaps, so tensors
are aligned to their own elements by being written in order of falling element size.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dino_exp.checkpoint.digests import content_digest, content_hasher
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.manifest import Chunk, PackEntry
from dino_exp.checkpoint.store import Store
from dino_exp.errors import CorruptCheckpointError
from dino_exp.fsio import DamagedFileError, Files, ReadHandle, WriteHandle

BLOCK_BYTES = 4 << 20  # digested and written while still in the processor's cache
_ALIGN = 64
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LARGEST = 10**15  # number in a header


class Key(NamedTuple):
    """What a tensor is called, and its kind."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class PackWriter:
    """Writes one pack.

    `keys` are those of everything that may be added; `wrote` hears of the bytes of each block.
    """

    def __init__(
        self,
        files: Files,
        path: Path,
        keys: Iterable[Key],
        wrote: Callable[[int], None] | None = None,
    ) -> None:
        bound = sum(
            len(_entry(Key(name, dtype, (*shape, _LARGEST)), _LARGEST, _LARGEST)) for name, dtype, shape in keys
        )
        self._header_bytes = -(-(8 + bound + 2) // _ALIGN) * _ALIGN
        assert self._header_bytes <= _MAX_HEADER_BYTES
        self.name, self._wrote = path.name, wrote
        self._entries: list[str] = []
        self._num_data_bytes = 0
        self._handle: WriteHandle = files.create(path)
        self._handle.write(bytes(self._header_bytes))

    @property
    def num_data_bytes(self) -> int:
        """Bytes behind the header."""
        return self._num_data_bytes

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added."""
        return not self._entries

    def add(self, key: Key, pieces: Iterable[bytes | memoryview]) -> tuple[int, int, str]:
        """Append a tensor's bytes under its key. Returns their place in the file, their number and their digest."""
        start, digest = self._append(pieces)
        self._entries.append(_entry(key, start, self._num_data_bytes))
        return self._header_bytes + start, self._num_data_bytes - start, digest

    def add_bytes(self, name: str, pieces: Iterable[bytes | memoryview]) -> tuple[int, int, str]:
        """Append bytes that stand for a tensor. Returns as `add`."""
        start, digest = self._append(pieces)
        size = self._num_data_bytes - start
        self._entries.append(_entry(Key(name, "uint8", (size,)), start, self._num_data_bytes))
        return self._header_bytes + start, size, digest

    def _append(self, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
        start, hasher = self._num_data_bytes, content_hasher()
        for piece in pieces:
            whole = memoryview(piece)
            for at in range(0, len(whole), BLOCK_BYTES):
                block = whole[at : at + BLOCK_BYTES]
                hasher.update(block)
                self._handle.write(block)
                self._num_data_bytes += len(block)
                if self._wrote is not None:
                    self._wrote(len(block))
        return start, hasher.hexdigest()

    def finish(self) -> PackEntry:
        """Fill in the header and sync the file."""
        text = ("{" + "".join(self._entries).rstrip(",") + "}").encode()
        length = self._header_bytes - 8
        assert len(text) <= length
        header = length.to_bytes(8, "little") + text.ljust(length)
        self._handle.write_at(0, header)
        self._handle.sync()
        return PackEntry(
            name=self.name,
            bytes=self._header_bytes + self._num_data_bytes,
            header_bytes=self._header_bytes,
            header_digest=content_digest(header),
        )

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def write_pack(
    store: Store,
    name: PackName,
    keys: Iterable[Key],
    fill: Callable[[PackWriter], None],
    wrote: Callable[[int], None] | None,
) -> list[PackEntry]:
    """A synced pack of whatever `fill` adds under these keys; none where it adds nothing. Raises OSError."""
    try:
        with PackWriter(store.files, store.new_pack_path(str(name)), keys, wrote) as pack:
            fill(pack)
            if not pack.is_empty:
                return [pack.finish()]
    except BaseException:
        with contextlib.suppress(OSError):  # the next sweep takes it
            store.remove_packs([str(name)])
        raise
    store.remove_packs([str(name)])
    return []


def _entry(key: Key, start: int, end: int) -> str:
    value = {"dtype": DTYPES[key.dtype].code, "shape": list(key.shape), "data_offsets": [start, end]}
    return f"{json.dumps(key.name)}:{json.dumps(value, separators=(',', ':'))},"  # ASCII: characters are bytes


class PackReader:
    """Opens the packs of one manifest when they are needed, and reads chunks from them."""

    def __init__(self, files: Files, folder: Path, packs: Iterable[PackEntry]) -> None:
        self._files, self._folder = files, folder
        self._packs: Mapping[str, PackEntry] = {pack.name: pack for pack in packs}
        self._open: dict[str, ReadHandle] = {}

    def handle(self, name: str) -> ReadHandle:
        """The open pack. Raises CorruptCheckpointError if it is missing or of another size; OSError."""
        if name not in self._open:
            try:
                handle = self._files.open_read(self._folder / name)
            except FileNotFoundError as problem:
                raise CorruptCheckpointError(f"pack {name} is missing") from problem
            except DamagedFileError as problem:
                raise CorruptCheckpointError(str(problem)) from problem
            self._open[name] = handle
        handle, expected = self._open[name], self._packs[name].bytes
        if handle.num_bytes != expected:
            raise CorruptCheckpointError(f"pack {name} has {handle.num_bytes} bytes, expected {expected}")
        return handle

    def check_header(self, name: str) -> None:
        """Compare length and header with their digest. Raises CorruptCheckpointError, OSError."""
        pack, handle = self._packs[name], self.handle(name)  # the file is as long as it should be: now allocate
        if pack.header_bytes > _MAX_HEADER_BYTES:
            raise CorruptCheckpointError(f"pack {name}: a header of {pack.header_bytes} bytes is not ours")
        data = memoryview(bytearray(pack.header_bytes))
        handle.read_into(0, data)
        if content_digest(data) != pack.header_digest:
            raise CorruptCheckpointError(f"pack {name}: the digest of its header differs")

    def check_stored(self, chunk: Chunk, buffer: memoryview) -> None:
        """Digest the stored bytes in pieces of `buffer`. Raises CorruptCheckpointError, OSError."""
        handle, hasher = self.handle(chunk.pack), content_hasher()
        for at in range(0, chunk.stored_bytes, len(buffer)):
            block = buffer[: min(len(buffer), chunk.stored_bytes - at)]
            hasher.update(block[: handle.read_into(chunk.start + at, block)])
        _compare(hasher.hexdigest(), chunk.stored_digest, chunk)

    def read_stored(self, chunk: Chunk, into: memoryview) -> None:
        """Fill `into` (`stored_bytes` long) and check its digest. Raises CorruptCheckpointError, OSError."""
        num = self.handle(chunk.pack).read_into(chunk.start, into)
        _compare(content_digest(into[:num]), chunk.stored_digest, chunk)

    def __enter__(self) -> PackReader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            handle.close()


def _compare(found: str, expected: str, chunk: Chunk) -> None:
    if found != expected:
        raise CorruptCheckpointError(
            f"{chunk.key} in {chunk.pack}: digest {found[:8]}… of {chunk.stored_bytes} bytes at "
            f"{chunk.start}, expected {expected[:8]}…"
        )
