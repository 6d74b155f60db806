"""The identity of a configuration as one text, and its hash.

The text is JSON in the canonical form of RFC 8785 (sorted keys, no spaces, ECMAScript numbers, UTF-8), so
that every spelling of the same settings gives the same bytes: `1e-3` and `0.001`, a default and the same
value typed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

from dino_exp.config.fields import REQUIRED, Section, entries, walk_schema, walk_values
from dino_exp.config.schema import Config
from dino_exp.errors import ConfigError

MAX_EXACT_INT = 2**53  # beyond it a JSON number no longer holds every whole number


def config_hash(config: Config) -> str:
    """`c1:` and the SHA-256 of the canonical identity: equal hashes mean the same run."""
    return "c1:" + _sha256(canonical_text(config))


def group_hash(config: Config) -> str:
    """`g1:` and the SHA-256 of the canonical identity without the seed: runs to average over."""
    identity = identity_values(config)
    del identity["seed"]
    return "g1:" + _sha256(canonical_json(identity))


def canonical_text(config: Config) -> str:
    """The text that `config_hash` hashes."""
    return canonical_json(identity_values(config))


def identity_values(config: Section) -> dict[str, Any]:
    """The nested identity values. A field at its legacy value is left out, so that old hashes stay."""
    nested: dict[str, Any] = {}
    for key, entry, value in walk_values(config):
        assert entry.setting is not None
        if entry.setting.role != "identity" or _is_legacy(entry.setting.legacy, value):
            continue
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = list(value) if isinstance(value, tuple) else value
    return nested


def left_out_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the identity values of a canonical text, by dotted key, lack: fields at a legacy value other than null."""
    return {
        key: legacy
        for key, legacy, choice, names in _legacies()
        if key not in settings and (choice is None or settings.get(choice) in names)
    }


@cache
def _legacies() -> tuple[tuple[str, Any, str | None, tuple[str, ...]], ...]:
    """Key, legacy value, and where other choices lack the key: the key of the choice and the names that have it."""
    found = []
    for part in entries(Config):
        for section in part.sections:
            fields = list(walk_schema(section, f"{part.name}."))
            choice = f"{part.name}.name" if len(part.sections) > 1 else None
            names = next((one.setting.choices for key, one in fields if key == choice and one.setting), ())
            for key, one in fields:
                meta = one.setting
                if meta is not None and meta.role == "identity" and meta.legacy not in (REQUIRED, None):
                    found.append((key, meta.legacy, choice, names))
    return tuple(found)


def canonical_json(value: Any, key: str = "") -> str:
    """A JSON value in the form of RFC 8785. Raises ConfigError, with its dotted key, for what JSON cannot hold."""
    if isinstance(value, dict):
        # RFC 8785 section 3.2.3: keys are sorted as UTF-16 code units.
        names = sorted(value, key=lambda name: name.encode("utf-16-be", "surrogatepass"))
        inner = {name: canonical_json(value[name], f"{key}.{name}" if key else name) for name in names}
        return "{" + ",".join(f"{_string(name)}:{text}" for name, text in inner.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical_json(item, key) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return number_text(value)
    except ConfigError as error:
        raise ConfigError(f"configuration: {key}: {error}" if key else str(error)) from None


def number_text(number: float) -> str:
    """A number as ECMAScript writes it (RFC 8785 section 3.2.2.3): the shortest text that reads back so."""
    if isinstance(number, int):
        if abs(number) > MAX_EXACT_INT:
            raise ConfigError(f"{number} is too large: JSON holds whole numbers up to 2**53")
        return str(number)
    if not math.isfinite(number):
        raise ConfigError(f"{number} is not a number that JSON can hold")
    if number == 0:
        return "0"
    sign = "-" if number < 0 else ""
    return sign + _positive_text(*_shortest_digits(abs(number)))


def _shortest_digits(number: float) -> tuple[str, int]:
    """Digits d and exponent e with number = 0.d * 10**e, from `repr`: the shortest digits that round-trip."""
    mantissa, _, exponent = repr(number).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    leading = len(whole + fraction) - len(digits)
    return digits.rstrip("0"), len(whole) - leading + int(exponent or 0)


def _positive_text(digits: str, point: int) -> str:
    """Number::toString of ECMAScript, with k = len(digits) and n = point."""
    if len(digits) <= point <= 21:
        return digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return "0." + "0" * -point + digits
    mantissa = digits if len(digits) == 1 else f"{digits[0]}.{digits[1:]}"
    return f"{mantissa}e{point - 1:+d}"


def _string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{text!r} is not valid Unicode") from None
    return json.dumps(text, ensure_ascii=False)


def _is_legacy(legacy: Any, value: Any) -> bool:
    return type(legacy) is type(value) and bool(legacy == value)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
