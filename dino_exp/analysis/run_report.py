"""The report of a run: what it came to, whether it is well, what happened to it, and how to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime

from dino_exp.analysis import run_chapters as chapters
from dino_exp.analysis.analyzer import CheckpointAnalyzer
from dino_exp.analysis.evolution import Moment
from dino_exp.analysis.figures.curves import draw_accuracy, draw_drive, draw_health, draw_loss
from dino_exp.analysis.page.document import (
    Alarm,
    Block,
    Command,
    Document,
    Facts,
    Figure,
    Folded,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    cell,
    pictures_of,
)
from dino_exp.analysis.plan import ReportPlan
from dino_exp.config.typed import override, train_command
from dino_exp.dino.collapse import collapse_kind
from dino_exp.errors import DinoExpError
from dino_exp.runs.jsontext import utc_text
from dino_exp.words import count_text, duration_text, moment_text, size_text

REFRESH_SECS = 20
GOING_ON = ("running",)


def make_report(
    run: CheckpointAnalyzer,
    plan: ReportPlan,
    *,
    look: Callable[[CheckpointAnalyzer], Sequence[Block]] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    now_secs: float | None = None,
) -> Document:
    """The report as it stands now. `look` makes the pictures that need the model and its images; None: left out.

    Raises UsageError where there is no run, DamagedFileError where its record cannot be read. What else cannot be read
    is told in its place.
    """
    record, now = run.record, time.time() if now_secs is None else now_secs
    before = [
        Section(title="Summary", anchor="summary", blocks=_safely(lambda: list(_summary(run, now)))),
        Section(title="Health", anchor="health", blocks=_safely(lambda: list(_health(run)))),
        Section(title="Timeline", anchor="timeline", blocks=_safely(lambda: list(chapters.timeline(run)))),
        Section(title="Weights", anchor="weights", blocks=_safely(lambda: list(_weights(run, plan, progress)))),
        Section(title="Storage", anchor="storage", blocks=_safely(lambda: list(chapters.storage(run, now)))),
    ]
    behind = [
        Section(title="Settings", anchor="settings", blocks=_safely(lambda: list(chapters.settings(run)))),
        Section(title="Identity", anchor="identity", blocks=_safely(lambda: list(chapters.identity(run)))),
        Section(title="Go on from here", anchor="next", blocks=_safely(lambda: list(_next(run)))),
    ]
    sees = []
    if look is not None:
        for picture in (picture for section in before for picture in pictures_of(section.blocks)):
            picture.svg()  # drawn now, because the model takes a while, elsewhere
        sees.append(Section(title="What it sees", anchor="sees", blocks=_safely(lambda: look(run))))
    return Document(
        title=record.run_key,
        subtitle=record.note or "A training of DINO, without labels.",
        made_at=utc_text(now),
        sections=[*before, *sees, *behind],
        refresh_secs=REFRESH_SECS if run.state in GOING_ON else None,
    )


def _safely(make: Callable[[], Sequence[Block]]) -> Sequence[Block]:
    """A chapter, or why there is none: a damaged file must not hide all others."""
    try:
        return make()
    except (DinoExpError, OSError) as problem:
        return [Alarm(f"This cannot be shown: {problem}")]


def _summary(run: CheckpointAnalyzer, now_secs: float) -> Iterator[Block]:
    record, history, schedule = run.record, run.history, run.record.schedule
    yield from _alarms(run)
    best, knn = record.best, history.latest("knn_top1")
    init, pixels = history.latest("init_knn_top1"), history.latest("pixel_knn_top1")
    against = [f"untrained {_percent(init)}"] * (init is not None) + [f"pixels {_percent(pixels)}"] * (
        pixels is not None
    )
    step = max(record.step, int(history.series("loss").steps[-1]) if len(history.series("loss")) else 0)
    epochs, horizon = step / schedule.steps_per_epoch, schedule.horizon_steps / schedule.steps_per_epoch
    secs = _working_secs(run, now_secs)
    yield Tiles(
        [
            Tile("state", run.state, count_text(len(record.attempts), "attempt")),
            Tile("epoch", f"{epochs:.4g} of {horizon:.4g}", f"step {step:,} of {schedule.horizon_steps:,}"),
            Tile(
                f"best {run.metric}",
                "–" if best is None else _value(best.metric, best.value),
                "none yet" if best is None else f"step {best.step:,}",
            ),
            Tile("k-NN now", _percent(knn), ", ".join(against)),
            Tile("loss now", _number(history.latest("loss")), f"held out {_number(history.latest('val_loss'))}"),
            Tile("time", duration_text(secs), _throughput(run)),
            Tile("checkpoints", f"{len(run.listing.rows):,}", f"{size_text(run.listing.disk_bytes)} on the disk"),
        ]
    )
    yield Figure(
        draw_accuracy(history, schedule.steps_per_epoch, best),
        "Share of held-out images whose class the nearest training images vote for; labels serve for this only.",
    )
    tags = [("tags", ", ".join(record.tags))] if record.tags else []
    started = [("last started", f"{moment_text(attempt.started_at)} UTC") for attempt in record.attempts[-1:]]
    yield Facts([("directory", str(run.directory)), *tags, *started])


def _alarms(run: CheckpointAnalyzer) -> Iterator[Block]:
    record = run.record
    last = record.attempts[-1] if record.attempts else None
    if run.state == "failed" and last is not None:
        yield Alarm(f"The last attempt failed: {last.error or 'see FAILED.txt'}")
    if run.state == "interrupted":
        yield Alarm(f"The last attempt was killed or aborted. To go on: {_resume(run)}")
    if record.failed_save is not None:
        yield Alarm(
            f"The disk did not take the checkpoint of step {record.failed_save.step}: {record.failed_save.error}"
        )
    if run.listing.num_unreadable:
        unread = count_text(run.listing.num_unreadable, "checkpoint")
        yield Alarm(f"{unread} cannot be read. Why: dino-exp checkpoints verify {run.quoted}")
    if run.history.problem is not None:
        yield Alarm(f"Metrics are shown up to where they can be read: {run.history.problem}")


def _health(run: CheckpointAnalyzer) -> Iterator[Block]:
    history, per_epoch = run.history, run.record.schedule.steps_per_epoch
    if not history.num_rows:
        yield Text("No row of metrics has been written yet.")
        return
    yield from _verdict(run)
    yield Figure(draw_loss(history, per_epoch), "Cross-entropy between teacher and student over all pairs of crops.")
    yield Figure(
        draw_health(history, per_epoch),
        "A model collapses when the divergence stays near zero, in the red, while the entropy of the teacher is at its "
        "highest, in the red, too (every image alike), or below the dotted line (few prototypes take all).",
    )
    yield Folded("Schedules and gradients", [Figure(draw_drive(history, per_epoch))])
    rows = [[cell(name), cell(history.latest(name)), cell(len(history.series(name)), "d")] for name in history.columns]
    latest = Table(title="Every metric, latest value", columns=("metric", "latest", "rows"), rows=rows)
    yield Folded("All metrics", [latest])


def _verdict(run: CheckpointAnalyzer) -> Iterator[Block]:
    """Whether the last rows look collapsed, and what is not a number."""
    history = run.history
    ratio, divergence = history.latest("entropy_ratio"), history.latest("kl")
    kind = None if ratio is None or divergence is None else collapse_kind(ratio, divergence)
    if kind is not None:
        yield Alarm(f"The last row looks collapsed ({kind}): entropy / ln K {ratio:.3f}, KL {divergence:.3f} nats.")
    odd = [name for name, series in history.columns.items() if len(series.finite) < len(series)]
    if odd:
        yield Alarm(f"Values that are no numbers, which curves leave out, in: {', '.join(odd)}.")
    if kind is None and not odd and ratio is not None:
        yield Text(f"The last row looks healthy: entropy / ln K {ratio:.3f}, KL {divergence:.3f} nats.")


def _weights(run: CheckpointAnalyzer, plan: ReportPlan, progress: Callable[[int], None]) -> Iterator[Block]:
    steps = chosen_steps(run, plan)
    total = len(run.listing.rows)
    all_of_them = Command(f"dino-exp checkpoints evolution {run.quoted}", "Measure every checkpoint")
    if not steps:
        yield Text(_why_none(plan, total))
        if total:
            yield all_of_them
        return
    moments: list[Moment] = list(run.evolution(steps, progress=progress))
    yield from chapters.weights(moments, total)
    if len(steps) < total:
        yield all_of_them


def _why_none(plan: ReportPlan, total: int) -> str:
    if not total:
        return "There is no checkpoint to measure yet."
    if plan.most_checkpoints < min(2, total):
        return f"--most {plan.most_checkpoints} leaves too few of {count_text(total, 'checkpoint')} to be compared."
    return f"The checkpoints are too large to be read here (--most-mb {plan.most_bytes // 10**6})."


def chosen_steps(run: CheckpointAnalyzer, plan: ReportPlan) -> list[int]:
    """The checkpoints that are measured: all, or as many as may be read, evenly spread, with first, last and best."""
    rows = run.listing.rows
    unread = [step for step in run.reader.steps() if step not in {row["step"] for row in rows}]
    largest = max((row["content_bytes"] for row in rows), default=1) or 1
    most = min(plan.most_checkpoints, plan.most_bytes // largest)
    if most < min(2, len(rows)):
        return []
    if len(rows) > most:
        must = {0, len(rows) - 1, *(place for place, row in enumerate(rows) if "best" in row["kinds"])}
        even = [round(place * (len(rows) - 1) / max(most - 1, 1)) for place in range(most)]
        rows = [rows[place] for place in sorted({*even, *must})]
    return sorted([row["step"] for row in rows] + unread[: plan.most_checkpoints])


def _next(run: CheckpointAnalyzer) -> Iterator[Block]:
    here = run.quoted
    if run.state in ("interrupted", "preempted", "stopped", "failed"):
        yield Command(_resume(run), "Go on with the training")
    best = next((row for row in run.listing.rows if "best" in row["kinds"]), None)
    if best is not None and best["resumable"]:
        yield Command(
            train_command(override("fork", f"{run.directory}@best"), "train.epochs=<more>"),
            "Train longer from the best checkpoint, in a run of its own",
        )
    yield Command(f"dino-exp runs reproduce {here} --verify 20", "Train 20 steps again, and compare every bit")
    yield Command(f"dino-exp checkpoints verify {here}", "Check every byte of the checkpoints")
    yield Command(f"dino-exp checkpoints list {here}", "List the checkpoints")
    if run.listing.rows:
        at = "latest" if best is None else "best"
        yield Command(f"dino-exp checkpoints export {here}@{at} --to teacher.safetensors", "Take the weights along")
    yield Command(f"dino-exp runs show {here}", "Everything that is recorded")


def _resume(run: CheckpointAnalyzer) -> str:
    return train_command(override("resume", run.directory))


def _working_secs(run: CheckpointAnalyzer, now_secs: float) -> float:
    """Of all attempts; of one that was killed, up to the last thing that it told."""
    total = 0.0
    for span in run.timeline().spans:
        is_going_on = span.number == len(run.record.attempts) and run.state in GOING_ON
        end = now_secs if is_going_on else _secs(span.ended_at or span.last_heard_at or span.started_at)
        total += max(end - _secs(span.started_at), 0.0)
    return total


def _secs(moment: str) -> float:
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return 0.0


def _throughput(run: CheckpointAnalyzer) -> str:
    speeds = run.history.wall.get("images_per_sec")
    return "" if speeds is None or not len(speeds.finite) else f"{speeds.finite.values[-1]:,.0f} images/s"


def _percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{100 * share:.1f} %"


def _value(metric: str, value: float) -> str:
    return _number(value) if metric.endswith("loss") else _percent(value)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
