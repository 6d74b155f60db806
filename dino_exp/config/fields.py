"""What a setting is: a field of a frozen dataclass with help, a role and bounds.

A section of the configuration is a dataclass derived from `Section`. Its fields are written with `setting`,
whose metadata says everything that the checks, the hash, the resume rules and the reference table need.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dino_exp.errors import ConfigError

Role = Literal["identity", "numerics", "budget", "runtime"]
"""identity changes the result; numerics perhaps its bits; budget where to stop; runtime none of these."""

REQUIRED: Any = object()
"""A setting without a legacy value: it must be given."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The metadata of one field. Bounds hold for each element of a list; `None` is outside all bounds."""

    help: str
    role: Role
    choices: tuple[str, ...]
    minimum: float
    above: float
    maximum: float
    pattern: str | None
    increasing: bool
    legacy: Any


def setting(
    *,
    help: str,  # noqa: A002  (the word that the reference table and every argument parser use)
    role: Role = "identity",
    choices: tuple[str, ...] = (),
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    pattern: str | None = None,
    increasing: bool = False,
    legacy: Any = REQUIRED,
) -> Any:
    """A dataclass field that carries a `Setting`. An unmarked role is identity, the safe side.

    `minimum` and `maximum` are inclusive, `above` is exclusive; `increasing` asks for a sorted list;
    `legacy` is the value at which a field added after a release is left out of the hash, and which stands
    where the field is absent.
    """
    meta = Setting(
        help=help,
        role=role,
        choices=choices,
        minimum=minimum,
        above=above,
        maximum=maximum,
        pattern=pattern,
        increasing=increasing,
        legacy=legacy,
    )
    return dataclasses.field(metadata={"setting": meta})


@dataclass(frozen=True)
class Entry:
    """One field of a section: its name, its type, and its `Setting` or else the sections that it may hold."""

    name: str
    hint: Any
    setting: Setting | None
    sections: tuple[type[Section], ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings that cannot exist with a wrong type or a value out of its bounds."""

    def __post_init__(self) -> None:
        problems = []
        for entry in entries(type(self)):
            if entry.setting is not None:
                problem = value_problem(entry, getattr(self, entry.name))
                if problem:
                    problems.append(f"{type(self).__name__}.{entry.name}: {problem}")
        if problems:
            raise ConfigError("\n".join(problems))


_entries: dict[type[Section], tuple[Entry, ...]] = {}  # reading the hints of all sections takes longer than using them


def entries(cls: type[Section]) -> tuple[Entry, ...]:
    """The fields of a section in the order in which they are written."""
    if cls not in _entries:
        _entries[cls] = tuple(_read_entries(cls))
    return _entries[cls]


def _read_entries(cls: type[Section]) -> Iterator[Entry]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        classes = [one for one in _alternatives(hint) if isinstance(one, type)]
        sections = tuple(one for one in classes if issubclass(one, Section))
        yield Entry(field.name, hint, field.metadata.get("setting"), sections)


def walk_values(section: Section, prefix: str = "") -> Iterator[tuple[str, Entry, Any]]:
    """Every (dotted key, entry, value) of a configuration, depth first."""
    for entry in entries(type(section)):
        value = getattr(section, entry.name)
        if entry.sections:
            yield from walk_values(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry, value


def walk_schema(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, Entry]]:
    """Every (dotted key, entry) that a section can hold, over all its alternatives; a key may come twice."""
    for entry in entries(cls):
        if not entry.sections:
            yield prefix + entry.name, entry
        for section in entry.sections:
            yield from walk_schema(section, f"{prefix}{entry.name}.")


def walk_mapping(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of nested plain dictionaries."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from walk_mapping(inner, f"{prefix}.{key}" if prefix else str(key))


def convert(hint: Any, value: Any) -> Any:
    """`value` as the type `hint` wants it, or a ValueError that says in words what was expected.

    A whole number passes for a float, and for text (`run.variant=2`); a list becomes a tuple. Else nothing
    bends. Types are int, float, str, bool, a tuple of one of them, also alternatives of these, and with None.
    """
    options = _alternatives(hint)
    if value is None and type(None) in options:
        return None
    for option in options:
        try:
            return _convert_to(option, value)
        except ValueError:
            continue
    raise ValueError(describe(hint))


def _convert_to(hint: Any, value: Any) -> Any:
    """The same for one type, without alternatives. Raises ValueError."""
    if typing.get_origin(hint) is tuple:
        return _convert_list(hint, value)
    kind = type(value)
    if kind is hint or (kind is int and hint in (float, str)):
        try:
            return hint(value)
        except OverflowError:  # a whole number beyond every float
            raise ValueError(describe(hint)) from None
    raise ValueError(describe(hint))


def value_problem(entry: Entry, value: Any) -> str | None:
    """What is wrong with a value of the right shape: its type or its bounds; None when nothing is."""
    assert entry.setting is not None
    try:
        same = convert(entry.hint, value)
    except ValueError as error:
        return f"expected {error}, got {value!r}"
    if type(same) is not type(value):
        return f"expected {describe(entry.hint)}, got {value!r}"
    items = value if isinstance(value, tuple) else (value,)
    for item in items:
        wanted = _bound_problem(entry.setting, item)
        if wanted:
            return f"expected {wanted}, got {item!r}"
    if entry.setting.increasing and list(items) != sorted(items):
        return f"expected [low, high] in rising order, got {list(items)}"
    return None


def describe(hint: Any) -> str:
    """A type in the words of the error messages and of the reference table."""
    options = _alternatives(hint)
    nullable = " or null" if type(None) in options else ""
    return " or ".join(_describe_one(one) for one in options if one is not type(None)) + nullable


def _describe_one(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        args = typing.get_args(hint)
        count = "" if args[-1] is ... else f"{len(args)} "
        return f"a list of {count}{_PLURALS[args[0]]}"
    return _WORDS[hint]


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "true or false"}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _convert_list(hint: Any, value: Any) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    if not isinstance(value, list | tuple) or (args[-1] is not ... and len(value) != len(args)):
        raise ValueError(describe(hint))
    return tuple(convert(args[0], item) for item in value)


def _bound_problem(meta: Setting, item: Any) -> str | None:
    if isinstance(item, float) and not math.isfinite(item):
        return "a finite number"
    if isinstance(item, int | float) and not isinstance(item, bool):
        return _range_problem(meta, item)
    if isinstance(item, str) and meta.choices and item not in meta.choices:
        return "one of " + ", ".join(meta.choices)
    if isinstance(item, str) and meta.pattern and not re.fullmatch(meta.pattern, item):
        return f"text of the form {meta.pattern}"
    return None


def _range_problem(meta: Setting, number: float) -> str | None:
    if number < meta.minimum:
        return f"at least {meta.minimum:g}"
    if number <= meta.above:
        return f"more than {meta.above:g}"
    if number > meta.maximum:
        return f"at most {meta.maximum:g}"
    return None
