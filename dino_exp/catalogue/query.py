"""Questions to a view of the catalogue: which runs, in which order, and which is the best."""

from __future__ import annotations

import difflib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import yaml

from dino_exp.catalogue.database import View, told
from dino_exp.catalogue.entry import MODEL_NAME
from dino_exp.config.canonical import canonical_json
from dino_exp.config.compare import roles_by_key
from dino_exp.config.texts import METRICS
from dino_exp.errors import ConfigError, UsageError
from dino_exp.runs.record import STATES

Mode: TypeAlias = Literal["max", "min"]

_LESS_IS_BETTER = ("loss", "val_loss")
_WHOLE = "name, shown_state, started_at, settings, doc"
_OF_YAML = (ValueError, LookupError, AttributeError, RecursionError)  # that it leaves to Python, for odd texts
_MOST = 2**63 - 1  # what SQLite takes
_SORTS = {"started": "started_at", "step": "step", "key": "name"}


class _Ranked(NamedTuple):
    """The best checkpoint of a run, and the code that wrote it."""

    name: str
    value: float
    step: int
    code_id: str | None
    commit: str | None
    dirty: int | None

    def public(self, metric: str) -> dict[str, Any]:
        dirty = None if self.dirty is None else bool(self.dirty)
        code = {"id": self.code_id, "commit": self.commit, "dirty": dirty}
        return {"step": self.step, "metric": metric, "value": self.value, "code": code}


def natural_mode(metric: str) -> Mode:
    """Whether more of a metric is better, or less."""
    return "min" if metric in _LESS_IS_BETTER else "max"


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which runs: all of `where` (setting, value), any of `states`, all of `tags`."""

    where: tuple[tuple[str, Any], ...] = ()
    states: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @classmethod
    def parse(cls, where: Sequence[str], states: Sequence[str], tags: Sequence[str]) -> Filter:
        """From what people type. Raises UsageError for an unknown setting or state, with what was probably meant."""
        for state in states:
            if state not in STATES:
                raise UsageError(f"--state {state}: expected one of {', '.join(STATES)}")
        return cls(where=tuple(map(_condition, where)), states=tuple(states), tags=tuple(tags))

    def sql(self) -> tuple[str, list[Any]]:
        """The condition on `runs`, and its values."""
        terms, values = ["state IS NOT NULL"], list[Any]()  # NULL: its record cannot be read
        for key, value in self.where:
            path = f'$."{key}"'
            if value is None:
                terms.append("json_extract(settings, ?) IS NULL")
                values.append(path)
                continue
            terms.append("json_extract(settings, ?) = json_extract(?, '$')")
            terms.append("json_type(settings, ?) IN ('true', 'false') = ?")  # to SQLite, false is 0
            values += [path, json.dumps(value), path, isinstance(value, bool)]
        if self.states:
            terms.append(f"shown_state IN ({', '.join('?' * len(self.states))})")
            values += self.states
        for tag in self.tags:
            terms.append("EXISTS (SELECT 1 FROM json_each(tags) WHERE value = ?)")
            values.append(tag)
        return " AND ".join(terms), values


def _condition(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--where {text}: expected <setting>=<value>, such as model=vit_s or optimizer.lr=1e-3")
    known = _indexed_settings()
    chosen = key if key in known else f"{key}.name"
    if chosen not in known:
        what = _near(key, known) or "only settings that change the result are indexed"
        raise UsageError(f"--where {text}: no such setting; {what}")
    try:
        return chosen, _as_a_setting(yaml.safe_load(value), value)
    except (yaml.YAMLError, *_OF_YAML) as error:
        raise UsageError(f"--where {text}: the value is no YAML: {error}") from error


def _indexed_settings() -> list[str]:
    return sorted({MODEL_NAME, *(key for key, role in roles_by_key().items() if role == "identity")})


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else ""


def _as_a_setting(value: Any, typed: str) -> Any:
    """What the canonical text of a run has for a value; what JSON cannot hold of YAML, such as a date, is text."""
    try:
        plain = json.loads(json.dumps(_with_numbers(value), allow_nan=False))
        return json.loads(canonical_json(plain))  # 1.0 as 1: SQLite compares lists by their text
    except (TypeError, ValueError, ConfigError):
        return typed


def _with_numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 for text, which people take for a number."""
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def list_runs(view: View, runs: Filter, *, sort: str = "started", limit: int | None = None) -> list[dict[str, Any]]:
    """The public fields of runs and their settings, the newest (highest, last) first.

    `sort`: started, step, key, or a metric (by its latest value). Raises UsageError for a metric that no run has.
    """
    condition, values = runs.sql()
    column = _SORTS.get(sort)
    if column is None:
        column = (
            "(SELECT value FROM json_each(doc, '$.metrics') WHERE key = ? AND type IN ('integer', 'real'))"  # no "nan"
        )
        values.append(sort)
    order = f"{column} {'ASC' if sort == 'key' else 'DESC'} NULLS LAST, name"
    values.append(-1 if limit is None else min(limit, _MOST))
    found = view.rows(
        f"SELECT {_WHOLE} FROM runs WHERE {condition} ORDER BY {order} LIMIT ?",
        values,
    )
    rows = [_row(*one) for one in found]
    if sort not in _SORTS and rows and all(sort not in row["metrics"] for row in rows):
        names = sorted({name for row in rows for name in row["metrics"]})
        raise UsageError(f"--sort {sort}: no run has this metric; expected {', '.join([*_SORTS, *names])}")
    return rows


def check_columns(view: View, names: Sequence[str], fields: Sequence[str]) -> None:
    """Raise UsageError for a name that is none of `fields`, no metric (of a run, or one of ours), and no setting."""
    settings = _indexed_settings()
    known = {*fields, "loss", *METRICS, *settings, *(key.removesuffix(".name") for key in settings)}
    if known.issuperset(names):
        return
    known |= {name for (name,) in view.rows("SELECT DISTINCT key FROM runs, json_each(doc, '$.metrics')")}
    for name in names:
        if name not in known:
            what = _near(name, sorted(known)) or f"expected {', '.join(fields)}, a metric, or a setting of the result"
            raise UsageError(f"--columns {name}: no such column; {what}")


def count_runs(view: View, runs: Filter) -> int:
    """How many runs there are of these."""
    condition, values = runs.sql()
    return int(view.rows(f"SELECT count(*) FROM runs WHERE {condition}", values)[0][0])


def problems(view: View) -> dict[str, str]:
    """What of a run cannot be read, by name."""
    return dict(view.rows("SELECT name, problem FROM runs WHERE problem IS NOT NULL ORDER BY name"))


def best_runs(
    view: View, runs: Filter, *, metric: str, mode: Mode, commit: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Runs by their best checkpoint that is there, healthy and finite, the best first.

    `best` says which it is, and its `code` which wrote it: after a resume not always the run's.

    `commit`: only checkpoints that this commit (or one whose hash begins so) has written. Raises UsageError for a
    metric that no checkpoint has, where any has metrics.
    """
    ranked = _ranked(view, runs, metric, mode, commit)[:limit]
    rows = _rows_of(view, [one.name for one in ranked])
    return [{**rows[one.name], "best": one.public(metric)} for one in ranked if one.name in rows]


def best_groups(
    view: View, runs: Filter, *, metric: str, mode: Mode, commit: str | None = None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Runs of the same code that differ in the seed only, together: mean and spread of best values, best mean first.

    Of several runs of one seed the best counts, once. `std` is of the sample, None for a single run. Raises UsageError
    as `best_runs`.
    """
    ranked = _ranked(view, runs, metric, mode, commit)
    facts = {
        name: ((group, code), key, seed)
        for name, group, code, key, seed in view.rows("SELECT name, group_hash, code_id, run_key, seed FROM runs")
    }
    by_seed: dict[tuple[str, str], dict[Any, _Ranked]] = {}
    for one in ranked:
        if one.name in facts:
            group, _, seed = facts[one.name]
            by_seed.setdefault(group, {}).setdefault(seed, one)
    members = {group: list(ones.values()) for group, ones in by_seed.items()}
    means = {group: statistics.fmean(one.value for one in ones) for group, ones in members.items()}
    chosen = sorted(members, key=lambda group: means[group], reverse=mode == "max")[:limit]
    rows = _rows_of(view, [members[group][0].name for group in chosen])
    found = []
    for group in chosen:
        ones = members[group]
        row, values = rows.get(ones[0].name), [one.value for one in ones]
        if row is None:
            continue
        found.append(
            {
                "group_hash": group[0],
                "runs": [facts[one.name][1] for one in ones],
                "seeds": [facts[one.name][2] for one in ones],
                "metric": metric,
                "mean": means[group],
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "min": min(values),
                "max": max(values),
                "best": {"run_key": row["run_key"], **ones[0].public(metric)},
                "settings": {key: value for key, value in row["settings"].items() if key != "seed"},
            }
        )
    return found


def _ranked(view: View, runs: Filter, metric: str, mode: Mode, commit: str | None) -> list[_Ranked]:
    """The best checkpoint of each run, the best first; of equals of a run the earlier step."""
    condition, values = runs.sql()
    value, step, order = ("highest", "highest_step", "ASC") if mode == "max" else ("lowest", "lowest_step", "DESC")
    by_commit, commits = ("", []) if commit is None else ("AND substr(git_commit, 1, ?) = ?", [len(commit), commit])
    rows = view.rows(
        f"""SELECT name, {value}, {step}, code_id, git_commit, git_dirty FROM bests
            WHERE metric = ? {by_commit} AND name IN (SELECT name FROM runs WHERE {condition})
            ORDER BY {value} {order}, {step} DESC""",
        [metric, *commits, *values],
    )
    found = {row[0]: _Ranked(*row) for row in rows}  # the last of a run is its best
    if not found:
        names = [name for (name,) in view.rows("SELECT DISTINCT metric FROM bests ORDER BY metric")]
        if names and metric not in names:
            raise UsageError(f"--metric {metric}: no checkpoint has it; there are {', '.join(names)}")
    sign = -1 if mode == "max" else 1
    return sorted(found.values(), key=lambda one: (sign * one.value, one.name))


def _rows_of(view: View, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Whole rows by name, without those of runs that a rebuild has just found gone."""
    found = view.rows(f"SELECT {_WHOLE} FROM runs WHERE name IN (SELECT value FROM json_each(?))", [json.dumps(names)])
    return {one[0]: _row(*one) for one in found}


def _row(name: str, state: str, started_at: str | None, settings: str, doc: str) -> dict[str, Any]:
    with told():
        return {
            **json.loads(doc),
            "path": name,
            "state": state,
            "started_at": started_at,
            "settings": json.loads(settings),
        }
