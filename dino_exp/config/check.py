"""From the plain mapping that Hydra composes, or that a run stored, to a checked `Config`."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from dino_exp.config.fields import REQUIRED, Entry, Section, convert, entries, value_problem, walk_schema
from dino_exp.config.schema import AskedConfig, Config
from dino_exp.errors import ConfigError

AnySection = TypeVar("AnySection", bound=Section)
_ALIKE = 0.66  # from here on: a letter too many in a name of one letter is two thirds alike
MISSING = "???"  # OmegaConf's mark of a value that must be given


def config_from_mapping(mapping: Mapping[str, Any]) -> Config:
    """The typed configuration of a nested plain mapping (section -> key -> value).

    Raises ConfigError with one line for each unknown key, missing value, wrong type and value out of its
    bounds; when there is none of these, with one line for each impossible combination.
    """
    return section_from_mapping(Config, mapping)


def asked_from_mapping(mapping: Mapping[str, Any]) -> AskedConfig:
    """The same of a command that goes on from a run; what goes together is left to `compare.overlay`."""
    return section_from_mapping(AskedConfig, mapping)


def section_from_mapping(
    cls: type[AnySection], mapping: Mapping[str, Any], prefix: str = "", schema: type[Section] = Config
) -> AnySection:
    """One section, whose keys are called `prefix` and their name, as `config_from_mapping` reads all of them.

    `schema` is the whole that it belongs to: what wrong keys are compared with.
    """
    problems: list[str] = []
    values = _read_section(cls, mapping, prefix, _Findings(schema, problems))
    if values is None or problems:
        raise ConfigError(_report(problems))
    try:
        made = values()
    except ConfigError as error:
        raise ConfigError(_report(str(error).splitlines())) from None
    assert isinstance(made, cls)
    return made


def known_keys(schema: type[Section] = Config) -> tuple[str, ...]:
    """Every dotted key that some configuration can have, in the order of the schema."""
    if schema not in _known:
        _known[schema] = tuple(dict.fromkeys(key for key, _ in walk_schema(schema)))
    return _known[schema]


_known: dict[
    type[Section], tuple[str, ...]
] = {}  # walking a schema takes longer than a lookup, and many keys are asked


def suggest_keys(key: str, schema: type[Section] = Config) -> str:
    """The settings that a wrong dotted key may have meant: alike ones, or else all of its section."""
    section = key.rpartition(".")[0]
    sections = () if section else tuple(entry.name for entry in entries(schema) if entry.sections)
    alike = did_you_mean(key, known_keys(schema) + sections)
    members = [name for name in known_keys(schema) if section and name.startswith(f"{section}.")]
    return alike or (f"; there are {', '.join(members)}" if members else "")


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """'; did you mean a, or b?' for the candidates that look most like `word`, or the empty string.

    A key without its section, or in the wrong one (`lr`), finds the keys whose last part is like its own.
    """
    scores = {name: _score(word, name) for name in candidates}
    best = max(scores.values(), default=0.0)
    near = [name for name in scores if scores[name] >= max(best - 0.02, _ALIKE)]
    near.sort(key=lambda name: -_likeness(word, name))
    return f"; did you mean {', or '.join(near[:3])}?" if near else ""


def _score(word: str, name: str) -> float:
    (section, _, last), (name_section, _, name_last) = word.rpartition("."), name.rpartition(".")
    by_last = _likeness(last, name_last)
    return by_last if section == name_section else max(_likeness(word, name), 0.9 * by_last)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower(), other.lower()).ratio()


def _report(problems: list[str]) -> str:
    if len(problems) == 1:
        return f"configuration: {problems[0]}"
    return "\n  ".join([f"configuration: {len(problems)} problems", *problems])


@dataclass(frozen=True)
class _Findings:
    """What is wrong so far with a mapping that should be a configuration of `schema`."""

    schema: type[Section]
    problems: list[str]


def _read_section(
    cls: type[Section], mapping: Mapping[str, Any], prefix: str, findings: _Findings
) -> functools.partial[Section] | None:
    """A call that makes the section, or None when its problems do not let it be made."""
    before = len(findings.problems)
    fields = {entry.name: entry for entry in entries(cls)}
    findings.problems.extend(
        _unknown(f"{prefix}{key}", mapping, findings.schema) for key in mapping if key not in fields
    )
    values = {name: _read_entry(entry, mapping, prefix, findings) for name, entry in fields.items()}
    if len(findings.problems) > before:
        return None
    return functools.partial(_make, cls, values)


def _make(cls: type[Section], values: dict[str, Any]) -> Section:
    made = {key: value() if isinstance(value, functools.partial) else value for key, value in values.items()}
    return cls(**made)


def _read_entry(entry: Entry, mapping: Mapping[str, Any], prefix: str, findings: _Findings) -> Any:
    key = prefix + entry.name
    raw = mapping.get(entry.name, MISSING)
    if entry.sections:
        cls = _choose_section(entry.sections, raw, key, findings)
        return None if cls is None else _read_section(cls, raw, f"{key}.", findings)
    assert entry.setting is not None
    if raw == MISSING and entry.setting.legacy is not REQUIRED:
        return entry.setting.legacy
    if raw == MISSING:
        findings.problems.append(f"{key}: no value is given; add {key}=<value>")
        return None
    try:
        value = convert(entry.hint, raw)
    except ValueError as error:
        findings.problems.append(f"{key}: expected {error}, got {raw!r}")
        return None
    problem = value_problem(entry, value)
    if problem:
        findings.problems.append(f"{key}: {problem}")
    return value


def _choose_section(
    sections: tuple[type[Section], ...], raw: Any, key: str, findings: _Findings
) -> type[Section] | None:
    """The section itself, or the one of several whose `name` is given."""
    if not isinstance(raw, Mapping):
        findings.problems.append(
            f"{key}: expected a section with keys, got {'nothing' if raw == MISSING else repr(raw)}"
        )
        return None
    if len(sections) == 1:
        return sections[0]
    by_name = {name: section for section in sections for name in _names(section)}
    name = raw.get("name", MISSING)
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    hint = did_you_mean(str(name), by_name)
    findings.problems.append(f"{key}.name: expected one of {', '.join(by_name)}, got {name!r}{hint}")
    return None


def _names(section: type[Section]) -> tuple[str, ...]:
    (setting,) = [entry.setting for entry in entries(section) if entry.name == "name"]
    assert setting is not None
    return setting.choices


def _unknown(key: str, mapping: Mapping[str, Any], schema: type[Section]) -> str:
    if key in known_keys(schema):
        return f"{key}: does not apply to {key.rpartition('.')[0]}={mapping.get('name')}"
    return f"{key}: there is no such setting{suggest_keys(key, schema)}"
