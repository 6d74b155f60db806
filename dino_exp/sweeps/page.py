"""The report of a sweep: its jobs in a table that sorts, each swept setting in a picture, groups, failures."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dino_exp.analysis.page.document import (
    Alarm,
    Block,
    Cell,
    Command,
    Document,
    Figure,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    cell,
)
from dino_exp.catalogue.query import natural_mode
from dino_exp.config.typed import train_command
from dino_exp.runs.jsontext import utc_text
from dino_exp.sweeps.outcome import Outcome
from dino_exp.sweeps.picture import draw_setting, draw_sweep
from dino_exp.sweeps.record import SweepRecord, resume_command
from dino_exp.sweeps.report import kept_of, metrics_shown, rank, swept_settings, value_of
from dino_exp.words import count_text

REFRESH_SECS = 20
_MEGA = 1e6


def sweep_document(
    record: SweepRecord, outcomes: Sequence[Outcome], metric: str, *, outputs: Path, now_secs: float
) -> Document:
    """The report as it stands now of a sweep below `outputs`.

    Raises UsageError for a metric that no job has, where any has metrics.
    """
    metrics = metrics_shown(outcomes, metric)
    sections = [
        Section(title="Summary", anchor="summary", blocks=list(_summary(record, outcomes, metric, outputs))),
        Section(title="Settings", anchor="settings", blocks=list(_pictures(outcomes, metric))),
        Section(title="Jobs", anchor="jobs", blocks=[_jobs(outcomes, metric, metrics)]),
        Section(title="Groups", anchor="groups", blocks=list(_groups(outcomes, metric))),
        Section(title="Failures", anchor="failures", blocks=list(_failures(outcomes))),
    ]
    going_on = any(one.state == "running" for one in outcomes)
    return Document(
        title=f"Sweep {record.name}",
        subtitle=f"{count_text(len(outcomes), 'job')}, compared by {metric}",
        made_at=utc_text(now_secs),
        sections=sections,
        refresh_secs=REFRESH_SECS if going_on else None,
    )


def _summary(record: SweepRecord, outcomes: Sequence[Outcome], metric: str, outputs: Path) -> Iterator[Block]:
    states = Counter(one.shown_state for one in outcomes)
    found = [(value, one) for one in outcomes if (value := _finite(one, metric)) is not None]
    tiles = [Tile("jobs", str(len(outcomes)), ", ".join(f"{num} {state}" for state, num in sorted(states.items())))]
    if found:
        value, best = min(found, key=lambda pair: rank(pair[1], metric))
        values = [value for value, _ in found]
        tiles.append(Tile(f"best {metric}", f"{value:.4g}", " ".join(best.job.overrides)))
        tiles.append(Tile("from – to", f"{min(values):.4g} – {max(values):.4g}", f"{len(values)} with a value"))
    else:
        yield Alarm(f"No job has {metric} yet.")
    yield Tiles(tiles)
    yield Command(
        train_command(*record.words(record.typed)),
        "The whole sweep again: finished jobs are skipped, others continued",
    )
    yield Command(resume_command(record.name, outputs), "The same by its name")


def _pictures(outcomes: Sequence[Outcome], metric: str) -> Iterator[Block]:
    swept, _ = swept_settings(outcomes)
    if not swept:
        yield Text("All jobs have the same settings.")
        return
    if not any(_finite(one, metric) is not None for one in outcomes):
        yield Text("Nothing to draw yet.")
        return
    others = [key for key in swept if key != "seed"]
    if len(others) == 2:
        yield Figure(draw_sweep(outcomes, metric), "Of several jobs in one place, seeds for one, the mean.")
    for key in swept:
        yield Figure(draw_setting(outcomes, metric, key), "A dot is a job; a bar is the mean of its column's dots.")


def _jobs(outcomes: Sequence[Outcome], metric: str, metrics: Sequence[str]) -> Table:
    swept, settings = swept_settings(outcomes)
    rows = []
    for number in sorted(range(len(outcomes)), key=lambda number: rank(outcomes[number], metric)):
        one, kept = outcomes[number], kept_of(outcomes[number])
        rows.append(
            [
                cell(number, "d"),
                *(_setting(settings[number].get(key)) for key in swept),
                *(cell(value_of(one, name), ".4f") for name in metrics),
                cell(None if kept.num_bytes is None else kept.num_bytes / _MEGA, ".1f"),
                cell(kept.most_lost_steps, "d"),
                cell(one.shown_state),
                cell(one.run_key),
            ]
        )
    columns = ("job", *swept, *metrics, "kept, MB", "a kill costs at most, steps", "state", "run")
    return Table(title="Jobs, the best first", columns=columns, rows=rows)


def _setting(text: str | None) -> Cell:
    try:
        number = None if text is None else float(text)
    except ValueError:
        number = None
    return Cell("–" if text is None else text, number)


def _groups(outcomes: Sequence[Outcome], metric: str) -> Iterator[Block]:
    """Jobs that differ in the seed only, together."""
    swept, settings = swept_settings(outcomes)
    others = [key for key in swept if key != "seed"]
    groups: dict[tuple[str, ...], list[float]] = {}
    for one, chosen in zip(outcomes, settings, strict=True):
        value = _finite(one, metric)
        groups.setdefault(tuple(chosen.get(key, "–") for key in others), []).extend([] if value is None else [value])
    known = {group: values for group, values in groups.items() if values}
    if not known:
        yield Text("No group has a value yet.")
        return
    sign = 1 if natural_mode(metric) == "min" else -1
    rows = [
        [
            *map(_setting, group),
            cell(len(values), "d"),
            cell(statistics.fmean(values), ".4f"),
            cell(statistics.stdev(values) if len(values) > 1 else None, ".4f"),
            cell(min(values), ".4f"),
            cell(max(values), ".4f"),
        ]
        for group, values in sorted(known.items(), key=lambda item: sign * statistics.fmean(item[1]))
    ]
    columns = (*others, "jobs", f"mean {metric}", "std", "min", "max")
    yield Table(title="Seeds together, the best mean first", columns=columns, rows=rows)


def _failures(outcomes: Sequence[Outcome]) -> Iterator[Block]:
    failed = [(number, one) for number, one in enumerate(outcomes) if one.has_failed]
    if not failed:
        yield Text("No job has failed.")
        return
    for number, one in failed:
        where = "" if one.traceback is None else f" Traceback: {one.traceback}"
        yield Alarm(f"Job {number} ({' '.join(one.job.overrides)}): {one.error or 'it says no reason'}.{where}")
        yield Command(one.command, f"Job {number} again")


def _finite(one: Outcome, metric: str) -> float | None:
    value = value_of(one, metric)
    return value if value is not None and math.isfinite(value) else None
