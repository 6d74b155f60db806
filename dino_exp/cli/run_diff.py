"""`dino-exp runs diff`: what two runs differ in, likely causes of other results first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from dino_exp.cli.arguments import OUTPUTS, JsonOption, OutputsOption, RunArgument
from dino_exp.cli.show import plain, print_json, print_table
from dino_exp.config.compare import ABSENT, roles_by_key
from dino_exp.config.fields import walk_mapping
from dino_exp.config.stored import stored_values
from dino_exp.config.typed import setting_text
from dino_exp.errors import UsageError
from dino_exp.fsio import read_json_bounded
from dino_exp.runs.changes import changed_settings
from dino_exp.runs.code_difference import code_difference
from dino_exp.runs.find import find_run
from dino_exp.runs.jsontext import spell
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import RunRecord, load_record

# In this order other results are most likely to come from them; the last ones only tell the runs apart.
SECTIONS = ("data", "settings", "seed", "code", "numerics", "environment", "budget", "runtime")
_CAUSES = SECTIONS[:6]
_OF_ATTEMPT = ", attempt "  # no setting has it in its name
_ENVIRONMENT = ("python", "platform", "cpu", "packages", "torch", "variables")  # the rest is of one process only


def diff(
    a: RunArgument,
    b: RunArgument,
    code: Annotated[bool, typer.Option("--code", help="Print the difference of the code as a patch.")] = False,
    outputs: OutputsOption = OUTPUTS,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs: data, settings, code, numerics, environment, metrics.

    What an attempt that went on with a run had otherwise is named with it.

    \b
    Examples:
      dino-exp runs diff vit_nano-67b8 last
      dino-exp runs diff vit_nano-67b8 last --code
    """
    one, other = (RunPaths(find_run(outputs, named)) for named in (a, b))
    if code:
        print(plain(code_difference(one.code_dir, other.code_dir), keep="\n\t"))
        return
    if as_json:
        print_json(compare(one, other))
    else:
        _print(_compare(one, other))


def compare(a: RunPaths, b: RunPaths) -> dict[str, Any]:
    """`{a, b, same_cause, differences: [{section, key, a, b}], metrics: [{name, a, b}], inexact}`.

    `inexact` are the attempts that do not continue their run to the same bits, `[{run, attempt, why}]`.

    What a later attempt had otherwise has its number in the key. `same_cause`: nothing that could change a result
    differs, and every attempt was exact. Raises UsageError, DamagedFileError, OSError.
    """
    found = _compare(a, b)
    sides = [{side: None if row[side] is ABSENT else row[side] for side in "ab"} for row in found["differences"]]
    return {**found, "differences": [row | side for row, side in zip(found["differences"], sides, strict=True)]}


def _compare(a: RunPaths, b: RunPaths) -> dict[str, Any]:
    """The same, with ABSENT for what one of the two does not have: beside it null is a value."""
    one, other = _record(a), _record(b)
    rows = [
        *_rows("data", *(_known({"data_fingerprint": run.data_fingerprint}) for run in (one, other))),
        *_by_role(_rows("settings", stored_values(a.directory), stored_values(b.directory))),
        *_by_role(_rows("settings", _changed_later(a, one), _changed_later(b, other))),
        *_rows("code", _known(_code(one)), _known(_code(other))),
        *_rows("numerics", one.numerics, other.numerics),
        *_rows(
            "numerics",
            *({_later("not exact", it["attempt"]): it["why"] for it in _inexact(run)} for run in (one, other)),
        ),
        *_rows("environment", _environment(a), _environment(b)),
    ]
    rows.sort(key=lambda row: SECTIONS.index(row["section"]))
    names = dict.fromkeys((*one.metrics, *other.metrics))
    metrics = [
        {"name": name, "a": spell(one.metrics.get(name)), "b": spell(other.metrics.get(name))}
        for name in names
        if one.metrics.get(name) != other.metrics.get(name)
    ]
    inexact = [*_inexact(one), *_inexact(other)]
    same = not inexact and not any(row["section"] in _CAUSES for row in rows)
    found = {"a": one.run_key, "b": other.run_key, "same_cause": same}
    return {**found, "differences": rows, "metrics": metrics, "inexact": inexact}


def _record(paths: RunPaths) -> RunRecord:
    record = load_record(paths.run_json)
    if record is None:
        raise UsageError(f"{paths.run_json}: there is no run")
    return record


def _rows(section: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"section": section, "key": key, "a": one.get(key, ABSENT), "b": other.get(key, ABSENT)}
        for key in dict.fromkeys((*one, *other))
        if one.get(key) != other.get(key)
    ]


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is recorded as not there, such as a commit where there is no git: unlike a setting of null."""
    return {name: value for name, value in facts.items() if value is not None}


def _by_role(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    roles = roles_by_key()
    sections = {"identity": "settings", "numerics": "numerics", "budget": "budget", "runtime": "runtime"}
    for row in rows:
        key = row["key"].partition(_OF_ATTEMPT)[0]
        row["section"] = "seed" if key == "seed" else sections[roles.get(key, "identity")]
    return rows


def _changed_later(paths: RunPaths, record: RunRecord) -> dict[str, Any]:
    """What later attempts had other than the settings of the run. Raises DamagedFileError."""
    return {
        _later(key, attempt.number): value
        for attempt in record.attempts[1:]
        for key, value in changed_settings(paths, attempt.number).items()
    }


def _code(record: RunRecord) -> dict[str, Any]:
    """The code that the run began with, and each other one that it went on with."""
    found, before = vars(record.code), record.code
    for attempt in record.attempts:
        if attempt.code != before:
            before = attempt.code
            found = {**found, **{_later(key, attempt.number): value for key, value in vars(before).items()}}
    return found


def _inexact(record: RunRecord) -> list[dict[str, Any]]:
    """The attempts that do not continue the run to the same bits."""
    return [
        {"run": record.run_key, "attempt": one.number, "why": "; ".join(one.why_not_exact)}
        for one in record.attempts
        if not one.exact
    ]


def _later(key: str, number: int) -> str:
    return f"{key}{_OF_ATTEMPT}{number}"


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
    lines = [(row["section"], row["key"], _shown(row["a"]), _shown(row["b"])) for row in found["differences"]]
    if lines:
        print_table(columns, lines)
    if found["same_cause"]:
        print("nothing differs that could change a result")
    elif not any(row["section"] in _CAUSES for row in found["differences"]):
        print("nothing differs that is recorded, but not every attempt is exact:")
        for one in found["inexact"]:
            print(plain(f"  {one['run']}, attempt {one['attempt']}: {one['why']}"))
    if found["metrics"]:
        print()
        metrics = [(row["name"], _metric(row["a"]), _metric(row["b"])) for row in found["metrics"]]
        print_table(("metric", found["a"], found["b"]), metrics, right=(found["a"], found["b"]))


def _shown(value: Any) -> str:
    return "–" if value is ABSENT else setting_text(value)


def _metric(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
