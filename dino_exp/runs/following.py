"""Reading `metrics.jsonl` while the training writes it."""

from __future__ import annotations

from pathlib import Path

from dino_exp.fsio import LOCAL
from dino_exp.runs.jsonl import parse_line
from dino_exp.runs.jsontext import Json

BLOCK_BYTES = 1 << 20


def rows_from(path: Path, num_bytes: int, block_bytes: int = BLOCK_BYTES) -> tuple[list[dict[str, Json]], int]:
    """The whole rows of about the next block after the first `num_bytes`, and how many bytes are read with them.

    A row that is not whole yet is left for the next time; no file is an empty one. Raises OSError, and
    DamagedFileError for a line that is not one JSON object.
    """
    try:
        handle = LOCAL.open_read(path)
    except FileNotFoundError:
        return [], num_bytes
    with handle:
        while True:
            size = max(0, min(block_bytes, handle.num_bytes - num_bytes))
            block = bytearray(size)
            found = bytes(block[: handle.read_into(num_bytes, memoryview(block))])
            end = found.rfind(b"\n") + 1
            if end or num_bytes + size >= handle.num_bytes:
                break
            block_bytes *= 2  # one row is longer than the block
    where = f"{path}, after byte {num_bytes}"
    return [parse_line(line, where) for line in found[:end].splitlines()], num_bytes + end
