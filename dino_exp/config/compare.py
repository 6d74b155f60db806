"""What a resume may change: settings compared by their roles."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from dino_exp.config.check import config_from_mapping
from dino_exp.config.fields import Role, Section, entries, walk_schema, walk_values
from dino_exp.config.schema import Config

Verdict = Literal["allowed", "warned", "refused"]
ABSENT = "(absent)"
"""Stands for a key that one of two configurations does not have, because another choice has other keys."""

# Numerics may change the last bits, so the resume goes on and says that it is no longer exact.
VERDICTS: dict[Role, Verdict] = {
    "identity": "refused",
    "numerics": "warned",
    "budget": "allowed",
    "runtime": "allowed",
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One setting that differs between a run and what was asked for."""

    key: str
    was: Any
    now: Any
    role: Role
    verdict: Verdict


def compare(was: Config, now: Config, touched: Collection[str]) -> list[Change]:
    """The touched keys whose values differ, in the order of the schema, each with its verdict.

    Only touched keys count, because the rest of a resumed run's settings comes from the run, not from today's
    defaults. The keys that name the run (`resume`, `fork`, `paths.*`) are never changes.
    """
    before, after = values_by_key(was), values_by_key(now)
    changes = []
    for key, role in roles_by_key().items():
        old, new = before.get(key, ABSENT), after.get(key, ABSENT)
        if key == "runtime.threads" and new is None:
            continue  # those of the first attempt are kept
        if key in touched and old != new and not is_place(key):
            changes.append(Change(key=key, was=old, now=new, role=role, verdict=VERDICTS[role]))
    return changes


def overlay(was: Config, now: Config, touched: Collection[str]) -> Config:
    """The settings of a run with the touched ones of a command: what a resume or a fork goes on with.

    A section is taken over whole where another kind of it was chosen (`optimizer=sgd` after `adamw`), which has other
    settings. Raises ConfigError where the two together are impossible.
    """
    merged, asked = as_mapping(was), as_mapping(now)
    replaced = {
        name for name in merged
        if f"{name}.name" in touched and type(getattr(was, name)) is not type(getattr(now, name))
    }  # fmt: skip
    merged |= {name: asked[name] for name in replaced}
    for key, value in values_by_key(now).items():
        *sections, name = key.split(".")
        if key not in touched or is_place(key) or replaced & set(sections):
            continue
        inner = merged
        for section in sections:
            inner = inner[section]
        inner[name] = value
    return config_from_mapping(merged)


def as_mapping(section: Section) -> dict[str, Any]:
    """A configuration as nested plain dicts and lists, in the order of the schema."""
    plain: dict[str, Any] = {}
    for entry in entries(type(section)):
        value = getattr(section, entry.name)
        if isinstance(value, Section):
            value = as_mapping(value)
        plain[entry.name] = list(value) if isinstance(value, tuple) else value
    return plain


def values_by_key(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key."""
    return {key: value for key, _, value in walk_values(config)}


def roles_by_key(schema: type[Section] = Config) -> dict[str, Role]:
    """The role of every setting that any configuration can have."""
    return {key: entry.setting.role for key, entry in walk_schema(schema) if entry.setting is not None}


def is_place(key: str) -> bool:
    """Whether a key says where a run lies; such keys come from the command alone and are not stored."""
    return key in ("resume", "fork") or key.startswith(("paths.", "sweep."))
