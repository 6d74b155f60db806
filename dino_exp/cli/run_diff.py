"""`dino-exp runs diff`: what two runs differ in, likely causes of other results first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument
from dino_exp.cli.show import plain, print_json, print_table
from dino_exp.config.compare import roles_by_key
from dino_exp.config.fields import walk_mapping
from dino_exp.config.stored import stored_values
from dino_exp.errors import UsageError
from dino_exp.fsio import read_json_bounded
from dino_exp.runs.code_difference import code_difference
from dino_exp.runs.find import find_run
from dino_exp.runs.jsontext import spell
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record

# In this order other results are most likely to come from them; the last ones only tell the runs apart.
SECTIONS = ("data", "settings", "seed", "code", "numerics", "environment", "budget", "runtime")
_CAUSES = SECTIONS[:6]
_ENVIRONMENT = ("python", "platform", "cpu", "packages", "torch", "variables")  # the rest is of one process only


def diff(
    a: RunArgument,
    b: RunArgument,
    code: Annotated[bool, typer.Option("--code", help="Print the difference of the code as a patch.")] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs: data, settings, code, numerics, environment, metrics.

    \b
    Examples:
      dino-exp runs diff vit_nano-67b8 last
      dino-exp runs diff vit_nano-67b8 last --code
    """
    one, other = (RunPaths(find_run(outputs, named)) for named in (a, b))
    if code:
        print(plain(code_difference(one.code_dir, other.code_dir), keep="\n\t"))
        return
    found = compare(one, other)
    if as_json:
        print_json(found)
        return
    _print(found)


def compare(a: RunPaths, b: RunPaths) -> dict[str, Any]:
    """`{a, b, same_cause, differences: [{section, key, a, b}], metrics: [{name, a, b}]}`.

    `same_cause`: nothing that could change a result differs. Raises UsageError, DamagedFileError, OSError.
    """
    one, other = _record(a), _record(b)
    rows = [
        *_rows("data", {"data_fingerprint": one.data_fingerprint}, {"data_fingerprint": other.data_fingerprint}),
        *_settings(a, b),
        *_rows("code", _code(one), _code(other)),
        *_rows("numerics", one.numerics, other.numerics),
        *_rows("environment", _environment(a), _environment(b)),
    ]
    rows.sort(key=lambda row: SECTIONS.index(row["section"]))
    names = dict.fromkeys((*one.metrics, *other.metrics))
    metrics = [
        {"name": name, "a": spell(one.metrics.get(name)), "b": spell(other.metrics.get(name))}
        for name in names
        if one.metrics.get(name) != other.metrics.get(name)
    ]
    same = not any(row["section"] in _CAUSES for row in rows)
    return {"a": one.run_key, "b": other.run_key, "same_cause": same, "differences": rows, "metrics": metrics}


def _record(paths: RunPaths) -> RunRecord:
    record = load_record(paths.run_json)
    if record is None:
        raise UsageError(f"{paths.run_json}: there is no run")
    return record


def _rows(section: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"section": section, "key": key, "a": one.get(key), "b": other.get(key)}
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    ]


def _settings(a: RunPaths, b: RunPaths) -> list[dict[str, Any]]:
    roles = roles_by_key()
    sections = {"identity": "settings", "numerics": "numerics", "budget": "budget", "runtime": "runtime"}
    rows = _rows("settings", stored_values(a.directory), stored_values(b.directory))
    for row in rows:
        role = roles.get(row["key"], "identity")
        row["section"] = "seed" if row["key"] == "seed" else sections[role]
    return rows


def _code(record: RunRecord) -> dict[str, Any]:
    return {"id": record.code.id, "commit": record.code.commit, "dirty": record.code.dirty}


def environment_differences(paths: RunPaths, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In what a run's environment was other than `now`: `{section, key, a, b}`. Raises DamagedFileError."""
    was, current = _environment(paths), _flat(now)
    both = was.keys() & current.keys()  # torch's build is recorded only where torch is loaded
    return _rows("environment", {key: was[key] for key in both}, {key: current[key] for key in both})


def _environment(paths: RunPaths) -> dict[str, Any]:
    try:
        found = read_json_bounded(paths.environment, max_depth=16)
    except FileNotFoundError:
        return {}
    return _flat(found) if isinstance(found, dict) else {}


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    return dict(walk_mapping({name: environment[name] for name in _ENVIRONMENT if name in environment}))


def _print(found: Mapping[str, Any]) -> None:
    columns = ("what", "key", found["a"], found["b"])
    lines = [(row["section"], row["key"], _text(row["a"]), _text(row["b"])) for row in found["differences"]]
    if lines:
        print_table(columns, lines)
    if found["same_cause"]:
        print("nothing differs that could change a result")
    if found["metrics"]:
        print()
        metrics = [(row["name"], _text(row["a"]), _text(row["b"])) for row in found["metrics"]]
        print_table(("metric", found["a"], found["b"]), metrics, right=(found["a"], found["b"]))


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
