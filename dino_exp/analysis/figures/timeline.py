"""A run's life in one picture: the metric above, attempts and checkpoints in the middle, bytes below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dino_exp.analysis.figures.curves import MOST_POINTS
from dino_exp.analysis.history import Series
from dino_exp.analysis.style import (
    ALARM,
    BEST,
    GRID,
    INK,
    MILESTONE,
    PINNED,
    QUIET,
    STUDENT,
    TEACHER,
    Picture,
    framed_figure,
    house,
    note,
)
from dino_exp.analysis.timeline import Save, Timeline
from dino_exp.runs.record import Best

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANES = (
    ("attempts", INK),
    ("saved, dropped", QUIET),
    ("kept", STUDENT),
    ("milestone", MILESTONE),
    ("best", BEST),
    ("pinned", PINNED),
    ("emergency", ALARM),
)
_KIND_LANES = ("milestone", "best", "pinned", "emergency")
_MEGA = 1e6


def draw_timeline(timeline: Timeline, metric: str, series: Series, best: Best | None) -> Picture:
    """`series` is the metric that the run is judged by."""
    used = _lanes_of(timeline)
    with house():
        figure = framed_figure(2.5 + 0.24 * len(used) + 1.1, left=1.12, top=0.1, hspace=0.14)
        above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[1.7, 0.27 * len(used), 1.0])
        per_epoch = timeline.steps_per_epoch
        _draw_metric(above, series, metric, per_epoch, best)
        _draw_lanes(middle, timeline, used)
        _draw_bytes(below, timeline)
        measured = series.finite.steps[-1:].tolist()
        saved, reached = [save.step for save in timeline.saves], [span.end for span in timeline.spans]
        last = max([*saved, *reached, *measured, per_epoch])
        below.set_xlim(-0.015 * last / per_epoch, 1.02 * last / per_epoch)
        below.set_xlabel("epoch")
    return Picture(name="timeline", title="Timeline", alt=_alt(timeline), figure=figure)


def _draw_metric(axes: Axes, series: Series, metric: str, per_epoch: int, best: Best | None) -> None:
    shown = series.finite.thinned(MOST_POINTS)
    if not len(shown):
        note(axes, f"{metric} was not measured yet")
        return
    axes.plot(shown.steps / per_epoch, shown.values, color=TEACHER, marker="o" if len(shown) < 40 else None)
    axes.set_ylabel(metric)
    axes.yaxis.set_label_coords(-0.115, 0.5)
    if best is not None and best.metric == metric:
        axes.plot(best.step / per_epoch, best.value, "o", color=BEST, markersize=8, zorder=5)
        axes.annotate("best", (best.step / per_epoch, best.value), xytext=(0, 7), textcoords="offset points",
                      color=BEST, ha="center", fontsize=9)  # fmt: skip
    axes.margins(y=0.16)


def _lanes_of(timeline: Timeline) -> list[tuple[str, str]]:
    kinds = {_lane(kind) for save in timeline.saves if save.is_here for kind in save.kinds}
    return [lane for lane in _LANES if lane[0] not in _KIND_LANES or lane[0] in kinds]


def _lane(kind: str) -> str:
    return kind.partition(":")[0]


def _draw_lanes(axes: Axes, timeline: Timeline, used: list[tuple[str, str]]) -> None:
    heights = {name: len(used) - place for place, (name, _) in enumerate(used)}
    colours = dict(used)
    per_epoch = timeline.steps_per_epoch
    axes.set_yticks(list(heights.values()), list(heights))
    for label, (_, colour) in zip(axes.get_yticklabels(), used, strict=True):
        label.set_color(colour)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False)
    axes.set_ylim(0.4, len(used) + 0.6)
    for height in heights.values():
        axes.axhline(height, color=GRID, linewidth=0.7, zorder=0)
    _draw_attempts(axes, timeline, heights["attempts"])
    gone = [save.step / per_epoch for save in timeline.saves if not save.is_here]
    axes.plot(gone, [heights["saved, dropped"]] * len(gone), "|", color=QUIET, markersize=6, markeredgewidth=0.9)
    here = [save for save in timeline.saves if save.is_here]
    for whole, fill in ((True, STUDENT), (False, "none")):
        steps = [save.step / per_epoch for save in here if save.is_whole is whole]
        axes.plot(steps, [heights["kept"]] * len(steps), "o", color=STUDENT, markerfacecolor=fill, markersize=5)
    for name in _KIND_LANES:
        steps = [save.step / per_epoch for save in here if name in map(_lane, save.kinds)]
        if steps:
            axes.plot(steps, [heights[name]] * len(steps), "D", color=colours[name], markersize=5)


def _draw_attempts(axes: Axes, timeline: Timeline, height: int) -> None:
    per_epoch = timeline.steps_per_epoch
    for span in timeline.spans:
        begin, end = span.begin / per_epoch, span.end / per_epoch
        axes.plot([begin, end], [height, height], color=INK, linewidth=5, solid_capstyle="butt", alpha=0.75)
        axes.plot([begin], [height], "|", color=INK, markersize=9)
        if span.was_killed or span.outcome == "failed":
            axes.plot([end], [height], "X", color=ALARM, markersize=7, zorder=5)
    for incident in timeline.incidents:
        if incident.kind in ("quarantined", "save_failed", "trouble") and incident.step is not None:
            axes.plot([incident.step / per_epoch], [height], "v", color=ALARM, markersize=6, zorder=5)


def _draw_bytes(axes: Axes, timeline: Timeline) -> None:
    here = [save for save in timeline.saves if save.is_here]
    if not here:
        note(axes, "no checkpoint on the disk")
        return
    per_epoch = timeline.steps_per_epoch
    places = [save.step / per_epoch for save in here]
    alone = [save.alone_bytes / _MEGA for save in here]
    shared = [save.shared_bytes / _MEGA for save in here]
    axes.vlines(places, 0, alone, color=STUDENT, linewidth=3)
    if any(shared):
        tops = [one + other for one, other in zip(alone, shared, strict=True)]
        axes.vlines(places, alone, tops, color=PINNED, linewidth=3)
        axes.text(1.0, 1.0, "needed by others, too", color=PINNED, transform=axes.transAxes, ha="right", fontsize=8)
        axes.text(0.0, 1.0, "its own", color=STUDENT, transform=axes.transAxes, ha="left", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("stored, MB")
    axes.yaxis.set_label_coords(-0.115, 0.5)


def _alt(timeline: Timeline) -> str:
    here = sum(save.is_here for save in timeline.saves)
    kills = sum(span.was_killed for span in timeline.spans)
    killed = f", {kills} of them killed" if kills else ""
    return (
        f"{len(timeline.spans)} attempts{killed}; {len(timeline.saves)} checkpoints were saved, {here} of them are kept"
        f"; {_most_kinds(timeline.saves)}."
    )


def _most_kinds(saves: tuple[Save, ...]) -> str:
    kinds = [_lane(kind) for save in saves if save.is_here for kind in save.kinds]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "none of a kind"
