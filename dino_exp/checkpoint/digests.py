"""Digests of content and of a whole state.

Content is digested as xxh3-128 of its row-major little-endian bytes: fast enough to check every byte of
every load, and meant against accidents. What names a state for people is SHA-256 over those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import xxhash

from dino_exp.checkpoint.canonical import canonical_json
from dino_exp.checkpoint.types import JSON

STATE_SCHEME = "s1:"


def content_hasher() -> xxhash.xxh3_128:
    """A running digest: feed it buffers with `update`, read it with `hexdigest` (32 hexadecimal digits)."""
    return xxhash.xxh3_128()


def content_digest(data: bytes | memoryview) -> str:
    """The digest of one buffer."""
    return xxhash.xxh3_128_hexdigest(data)


def state_digest(tensors: Iterable[tuple[str, str, Sequence[int], str]], state: Mapping[str, JSON]) -> str:
    """Whether two states are equal, whatever the codec, the world size or the sharding.

    `tensors`: (name, dtype, global shape, content digest of the whole tensor) of each, in any order;
    `state`: all JSON that matters to a resume.
    """
    rows = sorted([name, dtype, list(shape), digest] for name, dtype, shape, digest in tensors)
    text = canonical_json(rows) + b"\n" + canonical_json(dict(state))
    return STATE_SCHEME + hashlib.sha256(text).hexdigest()
