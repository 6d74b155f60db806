"""Reads the files that Weights & Biases keeps of a run: which steps are in them.

A `.wandb` file is a log of LevelDB's form (blocks of 32 KiB, in them pieces of records with a checksum each) after a
head of seven bytes; a record is a protobuf message of the wandb package. A file that a killed writer left ends torn.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK_BYTES = 1 << 15
_PIECE = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def run_files(folder: Path, prefix: str) -> list[Path]:
    """The files of a run's attempts below `folder`, the directories of which begin with `prefix`, the oldest first."""
    return sorted(folder.glob(f"{prefix}-*/run-*.wandb"))


def history_steps(path: Path) -> list[int]:
    """The step of each row in a file, in its order. Raises OSError."""
    return [step for step, _ in history(path)]


def history(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file: steps and values. Raises OSError."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    for data in records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            step = values.get("_step", record.history.step.num)
            yield int(step), values


def records(data: bytes) -> Iterator[bytes]:
    """The whole records of a file's bytes, up to the first damage; nothing of a file of another kind."""
    if not data.startswith(HEAD):
        return
    position, parts = len(HEAD), b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _PIECE.size:  # too little for a piece: filled up with zeros
            position += left
            continue
        if position + _PIECE.size > len(data):
            return
        checksum, size, kind = _PIECE.unpack_from(data, position)
        piece = data[position + _PIECE.size : position + _PIECE.size + size]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or zlib.crc32(piece, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += _PIECE.size + size
        parts = piece if kind in (_FULL, _FIRST) else parts + piece
        if kind in (_FULL, _LAST):
            yield parts
