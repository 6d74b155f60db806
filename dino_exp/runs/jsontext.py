"""JSON as runs write it: numbers that JSON cannot spell are the words "nan", "inf" and "-inf"."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def spell(value: object) -> Json:
    """`value` as strict JSON data: tuples become lists, numbers that are not finite become words.

    Raises TypeError for anything that JSON has no form for.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {_text_key(name): spell(member) for name, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [spell(member) for member in value]
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def number(value: Json) -> float | None:
    """The float that a JSON number or one of the words stands for; None when it is neither."""
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # a whole number beyond every float
        return None


def one_line(value: object) -> str:
    """`value` as one line of JSON, without the line feed."""
    return json.dumps(spell(value), allow_nan=False, separators=(", ", ": "))


def pretty(value: object) -> str:
    """`value` as indented JSON for people, ended by a line feed."""
    return json.dumps(spell(value), allow_nan=False, indent=2) + "\n"


def utc_text(secs: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, to the microsecond, of fixed width: sorts as text by time."""
    return datetime.fromtimestamp(secs, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _text_key(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"a JSON member must be named by text, got {name!r}")
    return name
