"""Strict reading of JSON data into dataclasses: a table of members and the check that each must pass.

A file in a run directory may be damaged or hostile, so nothing is converted, guessed or ignored: a member
that is missing, unknown or of another type is an error that says where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from dino_exp.runs.jsontext import Json, number

T = TypeVar("T")
Check: TypeAlias = Callable[[Json], T]
_MAX_WHOLE = 2**63
_MAX_NAME_CHARS = 80  # of a member's name in a message: a stranger may have made it as long as the file


class WrongShapeError(ValueError):
    """JSON data is not what was expected; the text says where and what."""

    def __init__(self, problem: str, where: str = "") -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.problem, self.where = problem, where

    def inside(self, name: str) -> WrongShapeError:
        """The same problem, seen from the object or list around it."""
        return WrongShapeError(self.problem, f"{name}.{self.where}" if self.where else name)


def text(value: Json) -> str:
    """A string."""
    if not isinstance(value, str):
        raise _wrong(value, "text")
    return value


def flag(value: Json) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _wrong(value, "true or false")
    return value


def whole(value: Json) -> int:
    """A whole number from 0 to 2**63 - 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_WHOLE:
        raise _wrong(value, "a whole number from 0")
    return value


def real(value: Json) -> float:
    """A number, or one of the words nan, inf, -inf."""
    found = number(value)
    if found is None:
        raise _wrong(value, "a number")
    return found


def anything(value: Json) -> Json:
    """Any JSON data."""
    return value


def optional(check: Check[T]) -> Check[T | None]:
    """Null, or what `check` takes."""
    return lambda value: None if value is None else check(value)


def list_of(check: Check[T]) -> Check[tuple[T, ...]]:
    """A list of what `check` takes."""

    def read(value: Json) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise _wrong(value, "a list")
        return tuple(_at(str(index), check, member) for index, member in enumerate(value))

    return read


def map_of(check: Check[T]) -> Check[dict[str, T]]:
    """An object of any member names, each value as `check` takes it."""

    def read(value: Json) -> dict[str, T]:
        return {name: _at(name, check, member) for name, member in _object(value).items()}

    return read


def record_of(kind: Callable[..., T], members: Mapping[str, Check[object]], may_lack: Sequence[str] = ()) -> Check[T]:
    """An object with exactly these members, handed to `kind` by name; its ValueErrors are passed on.

    A member of `may_lack` that is not there is left to the default of `kind`.
    """

    def read(value: Json) -> T:
        found = _object(value)
        if missing := members.keys() - found.keys() - set(may_lack):
            raise WrongShapeError(f"no member {sorted(missing)}")
        if unknown := found.keys() - members.keys():
            raise WrongShapeError(f"unknown member {[name[:_MAX_NAME_CHARS] for name in sorted(unknown)[:5]]}")
        given = {name: _at(name, check, found[name]) for name, check in members.items() if name in found}
        try:
            return kind(**given)
        except ValueError as error:
            raise WrongShapeError(str(error)) from error

    return read


def _object(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise _wrong(value, "an object")
    return value


def _at(name: str, check: Check[T], value: Json) -> T:
    try:
        return check(value)
    except WrongShapeError as error:
        raise error.inside(name[:_MAX_NAME_CHARS]) from None


def _wrong(value: Json, expected: str) -> WrongShapeError:
    return WrongShapeError(f"found {type(value).__name__} {str(value)[:40]!r}, expected {expected}")
