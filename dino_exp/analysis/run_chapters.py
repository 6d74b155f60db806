"""The chapters of a run's report that are tables in the first place."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dino_exp.analysis.analyzer import CheckpointAnalyzer
from dino_exp.analysis.evolution import Moment
from dino_exp.analysis.figures.evolution import draw_evolution
from dino_exp.analysis.figures.storage import Space, draw_storage
from dino_exp.analysis.figures.timeline import draw_timeline
from dino_exp.analysis.names import part_of
from dino_exp.analysis.page.document import Alarm, Block, Command, Facts, Figure, Folded, Table, Text, cell
from dino_exp.analysis.timeline import Save
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.config.compare import roles_by_key
from dino_exp.config.fields import walk_mapping
from dino_exp.config.stored import stored_values
from dino_exp.config.typed import setting_text
from dino_exp.errors import DinoExpError
from dino_exp.fsio import read_json_bounded
from dino_exp.runs.command import command_of
from dino_exp.words import age_text, count_text, moment_text, size_text

_MEGA = 1e6


def timeline(run: CheckpointAnalyzer) -> Iterator[Block]:
    """Attempts, saves and mishaps."""
    made = run.timeline()
    if made.problem is not None:
        yield Alarm(f"Events are shown up to where they can be read: {made.problem}")
    yield Figure(
        draw_timeline(made, run.metric, run.history.series(run.metric), run.record.best),
        "Crosses: attempts that were killed or failed. Ticks: checkpoints that were saved and went later. Rings: of "
        "which only a part was kept.",
    )
    rows = [
        [
            cell(span.number, "d"), cell(moment_text(span.started_at)), cell(span.begin, "d"), cell(span.end, "d"),
            cell("killed" if span.was_killed else span.outcome), cell(span.rolled_back, "d"),
            cell("yes" if span.exact else "no"), cell(span.error or ""),
        ]
        for span in made.spans
    ]  # fmt: skip
    columns = ("attempt", "started, UTC", "from step", "to step", "outcome", "steps done again", "exact", "error")
    yield Table(title="Attempts", columns=columns, rows=rows)
    if made.incidents:
        mishaps = [[cell(moment_text(one.time)), cell(one.step), cell(one.text)] for one in made.incidents]
        yield Table(title="What else happened", columns=("time, UTC", "step", "what"), rows=mishaps)
    if made.saves:
        saves = [
            [
                cell(save.step, "d"), cell(moment_text(save.saved_at)), cell(", ".join(save.reasons)),
                cell(", ".join(save.kinds)), cell(fate(save)),
            ]
            for save in made.saves
        ]  # fmt: skip
        table = Table(
            title="Checkpoints that were saved", columns=("step", "saved, UTC", "because", "kinds", "now"), rows=saves
        )
        yield Folded(f"All {count_text(len(saves), 'checkpoint')} that were saved, and why they went", [table])


def fate(save: Save) -> str:
    """What became of a checkpoint that was saved."""
    if save.is_here:
        return "here" if save.is_whole else "here, in part"
    return f"dropped: {save.dropped_because or 'nobody knows why'}"


def weights(moments: Sequence[Moment], total: int) -> Iterator[Block]:
    """How the weights moved, by those of `total` checkpoints that were measured."""
    for moment in moments:
        if moment.problem is not None:
            yield Alarm(f"The checkpoint of step {moment.step:,} is damaged: {moment.problem}")
    if len(moments) < total:
        yield Text(f"{len(moments)} of {total:,} checkpoints, evenly spread.")
    if len([one for one in moments if one.problem is None]) == 1:
        yield Text("There is one checkpoint: how weights change shows from the second on.")
    yield Figure(
        draw_evolution(moments),
        "Norms are Euclidean, over all weights. Dead prototypes get next to no gradient. Effective rank: how many "
        "directions a weight matrix really uses (Roy and Vetterli 2007).",
    )
    names = ("student_norm", "relative_change", "distance", "cosine", "first_moment", "second_moment")
    rows = [
        [
            cell(one.step, "d"),
            cell(one.epoch, "d"),
            *(cell(getattr(one.total, name)) for name in names),
            cell(one.dead_prototypes, "d"),
            cell("damaged" if one.problem else ""),
        ]
        for one in moments
    ]
    columns = (
        "step", "epoch", "norm", "relative change", "to teacher", "cosine", "1st moment", "√ 2nd", "dead", "remark",
    )  # fmt: skip
    yield Folded("The same as a table", [Table(title="Weights by checkpoint", columns=columns, rows=rows)])


def storage(run: CheckpointAnalyzer, now_secs: float) -> Iterator[Block]:
    """What lies on the disk."""
    listing = run.listing
    if not listing.rows:
        yield Text("No checkpoint has been saved yet." if not listing.num_unreadable else "No checkpoint can be read.")
        return
    content = sum(row["content_bytes"] for row in listing.rows)
    yield Text(
        f"{count_text(len(listing.rows), 'checkpoint')}: {size_text(listing.disk_bytes)} on the disk for "
        f"{size_text(content)} of states."
    )
    newest = run.reader.manifest("latest")
    yield Figure(draw_storage(_space(newest)), f"Of the newest checkpoint, step {newest.step:,}.")
    rows = [
        [
            cell(row["step"], "d"), cell(row["epoch"], "d"), cell(", ".join(row["kinds"])),
            cell(row["metrics"].get(run.metric)), *_megabytes(row), cell(age_text(row["created_at"], now_secs)),
            cell(("yes" if row["verified"] else "no") + ("" if row["resumable"] else ", thinned")),
        ]
        for row in listing.rows
    ]  # fmt: skip
    columns = ("step", "epoch", "kinds", run.metric, "state, MB", "stored, MB", "alone, MB", "saved", "verified")
    yield Table(title="Checkpoints", columns=columns, rows=rows)


def _megabytes(row: Mapping[str, Any]) -> Iterator[Any]:
    for name in ("content_bytes", "bytes", "frees_bytes"):
        yield cell(row[name] / _MEGA, ".2f")


def _space(manifest: Manifest) -> list[Space]:
    content, stored = Counter[str](), Counter[str]()
    for name, entry in manifest.tensors.items():
        content[part_of(name)] += entry.num_bytes
        stored[part_of(name)] += sum(chunk.stored_bytes for chunk in entry.chunks)
    return [Space(part, content[part], stored[part]) for part in content]


def settings(run: CheckpointAnalyzer) -> Iterator[Block]:
    """What was typed, and every setting."""
    with contextlib.suppress(DinoExpError):  # a run that was begun without the command line
        yield Command(command_of(run.paths), "What was typed; the same again is the same run")
    found = stored_values(run.directory)
    roles = roles_by_key()
    rows = [[cell(key), cell(setting_text(value)), cell(roles.get(key, "identity"))] for key, value in found.items()]
    for title, of_role in (("Settings that make the result", True), ("All other settings", False)):
        chosen = [row for row in rows if (row[2].text == "identity") is of_role]
        yield Folded(
            f"{title} ({len(chosen)})", [Table(title=title, columns=("setting", "value", "role"), rows=chosen)]
        )


def identity(run: CheckpointAnalyzer) -> Iterator[Block]:
    """Which settings, code and data, and on what machine."""
    record = run.record
    code, parent = record.code, record.parent
    origin = "–" if not isinstance(parent, Mapping) else " ".join(f"{name} {value}" for name, value in parent.items())
    yield Facts(
        [
            ("run", record.run_key),
            ("settings", record.config_hash),
            ("without the seed", record.group_hash),
            ("code", code.id),
            ("commit", f"{code.commit or 'none'}{' with uncommitted changes' if code.dirty else ''}"),
            ("data", record.data_fingerprint or "–"),
            ("forked from", origin),
            *((name.replace("_", " "), _text(value)) for name, value in record.numerics.items()),
        ]
    )
    not_exact = [(attempt.number, why) for attempt in record.attempts for why in attempt.why_not_exact]
    if not_exact:
        lines = [[cell(number, "d"), cell(why)] for number, why in not_exact]
        yield Alarm("Not every attempt is bit-equal to an uninterrupted run any more.")
        yield Table(title="Why not exact", columns=("attempt", "why"), rows=lines)
    else:
        yield Text("Every attempt went on in the bits in which the one before it stopped.")
    with contextlib.suppress(FileNotFoundError):
        found = read_json_bounded(run.paths.environment, max_depth=16)
        rows = [[cell(key), cell(_text(value))] for key, value in walk_mapping(found)]
        table = Table(title="Environment of the first attempt", columns=("what", "value"), rows=rows)
        yield Folded("Environment", [table])


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else setting_text(value)
