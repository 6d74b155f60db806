"""Codecs by the names and versions that manifests record, for who needs to know them only."""

from __future__ import annotations

from dino_exp.checkpoint.types import UnsupportedFormatError

RAW = "raw/1"  # content as it is
ZSTD = "zstd/1"  # byte planes, compressed
DELTA = "delta/1"  # what other chunks of the same box leave of it, as byte planes, compressed
KNOWN = (RAW, ZSTD, DELTA)


def check_codec(name: str) -> None:
    """Raise UnsupportedFormatError for a codec that this version does not know: not damage."""
    if name not in KNOWN:
        raise UnsupportedFormatError(
            f"codec {name!r} is unknown here, expected one of {', '.join(KNOWN)}; it was written by a newer "
            "version, so install that one to read it"
        )
