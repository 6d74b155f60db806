"""Canonical JSON, and files sealed by a digest of themselves.

Canonical: keys sorted, no spaces, ASCII, no NaN. Sealed: the canonical JSON of an object whose last key is
`digest`, the SHA-256 of the same text without that key. A changed byte anywhere in a sealed file is
noticed, and the last bytes of the file tell which version of it this is.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TypeGuard

from dino_exp.checkpoint.types import JSON
from dino_exp.errors import CheckpointError, CorruptCheckpointError
from dino_exp.fsio import parse_json

MAX_DEPTH = 96  # room for a capped chain of bases inside a manifest
_SEAL = re.compile(rb',"digest":"([0-9a-f]{64})"\}\n')
SEAL_BYTES = len(b',"digest":""}\n') + 64
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def canonical_json(value: JSON) -> bytes:
    """The one text of a JSON value. Raises ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def seal(body: Mapping[str, JSON]) -> bytes:
    """The bytes of a sealed file that holds `body`, a non-empty object without a key `digest`."""
    assert body
    assert "digest" not in body
    text = canonical_json(body)
    return text[:-1] + b',"digest":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def unseal(data: bytes, what: str) -> dict[str, JSON]:
    """The body of a sealed file. Raises CorruptCheckpointError when it is not what was sealed."""
    return parse_object(sealed_text(data, what), what)


def sealed_text(data: bytes, what: str) -> bytes:
    """The JSON of a sealed file's body, unparsed. Raises CorruptCheckpointError when its digest does not fit."""
    digest = seal_digest(data[-SEAL_BYTES:])
    text = data[:-SEAL_BYTES] + b"}"
    if digest is None or hashlib.sha256(text).hexdigest() != digest:
        raise CorruptCheckpointError(f"{what}: the digest at its end does not fit its {len(data)} bytes")
    return text


def parse_around(text: bytes, key: str, next_key: str, what: str) -> dict[str, JSON]:
    """The JSON object in `text` without its entry `key`, whose value, an object, is not even parsed.

    For a large entry that stands just before `next_key`. Where `text` is strict JSON the result is what parsing
    all of it would give, less that entry and any others between the two keys. What lies in there is not looked at.
    Raises CorruptCheckpointError for any other layout.
    """
    before, opening, rest = text.partition(f',"{key}":{{'.encode())
    _, closing, behind = rest.rpartition(f'}},"{next_key}":'.encode())
    if not opening or not closing:
        raise CorruptCheckpointError(f"{what}: no {key} before {next_key}")
    # Each part is a whole object once it is closed, or opened, by one bracket. So neither cut lies in a string,
    # and both lie between entries of the outermost object.
    first = parse_object(before + b"}", what)
    last = parse_object(f'{{"{next_key}":'.encode() + behind, what)
    if first.keys() & last.keys():
        raise CorruptCheckpointError(f"{what}: a key appears twice")
    return first | last


def parse_object(text: bytes, what: str) -> dict[str, JSON]:
    """The object that a JSON text holds, strictly and with bounded depth. Raises CorruptCheckpointError."""
    body = parse_json(text, what, max_depth=MAX_DEPTH, error=CorruptCheckpointError)
    if not isinstance(body, dict):
        raise CorruptCheckpointError(f"{what}: expected a JSON object")
    return body


def seal_digest(tail: bytes) -> str | None:
    """The digest that the last `SEAL_BYTES` bytes of a sealed file give; None when they are no seal."""
    found = _SEAL.fullmatch(tail)
    return found[1].decode() if found else None


def check_json(value: JSON, where: str) -> None:
    """Raise CheckpointError unless `value` comes back from JSON as it is: no tuples, arrays or NaN."""
    if value is None or isinstance(value, str) or type(value) in (bool, int):
        return
    if type(value) is float and math.isfinite(value):
        return
    if type(value) is list:
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]")
    elif type(value) is dict and all(type(key) is str for key in value):
        for key, item in value.items():
            check_json(item, f"{where}.{key}")
    else:
        raise CheckpointError(
            f"{where}: found {type(value).__name__} {str(value)[:60]!r}, expected a tensor or plain JSON"
        )


def metrics_to_json(metrics: Mapping[str, float]) -> dict[str, JSON]:
    """Numbers as they are; NaN and infinities, which JSON lacks, as `"nan"`, `"inf"`, `"-inf"`."""
    return {name: value if math.isfinite(value) else str(float(value)) for name, value in metrics.items()}


def metrics_from_json(given: JSON, what: str) -> dict[str, float]:
    """The inverse of `metrics_to_json`. Raises CorruptCheckpointError."""
    if not isinstance(given, dict):
        raise CorruptCheckpointError(f"{what}: expected an object of numbers")
    metrics = {}
    for name, value in given.items():
        number = _NON_FINITE.get(value) if isinstance(value, str) else value
        if not is_number(number):
            raise CorruptCheckpointError(f"{what}.{name[:80]}: expected a number, found {str(value)[:40]!r}")
        metrics[name] = number
    return metrics


def is_number(value: JSON) -> TypeGuard[float]:
    """What a metric may be."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)  # beyond it, no float
