"""How well frozen features tell the images apart, over a training, beside what needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dino_exp.analysis.style import MILESTONE, STUDENT, TEACHER, Picture, house, label_line, new_figure

# metric, its name in the picture, colour
_CURVES = (
    ("knn_top1", "k = 20", STUDENT),
    ("knn_10shot", "10 labels", TEACHER),
    ("knn_1shot", "1 label", MILESTONE),
)


def draw_accuracy(rows: Sequence[Mapping[str, Any]]) -> Picture | None:
    """k-NN accuracy over the epochs of rows of `metrics.jsonl`; None before the second evaluation.

    Dashed: the untrained model; dotted: raw pixels.
    """
    measured = [row for row in rows if isinstance(row.get("knn_top1"), float)]
    if len(measured) < 2:
        return None
    baselines = {name: value for row in rows for name, value in row.items() if name.startswith(("init_", "pixel_"))}
    with house():
        figure = new_figure()
        axes = figure.subplots()
        for name, label, colour in _CURVES:
            points = [(row["epoch"], 100 * row[name]) for row in measured if isinstance(row.get(name), float)]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), color=colour)
            label_line(axes, *points[-1], label, colour)
            for prefix, style in (("init_", "--"), ("pixel_", ":")):
                if isinstance(baselines.get(prefix + name), float):
                    axes.axhline(100 * baselines[prefix + name], color=colour, linestyle=style, linewidth=0.9)
        axes.set_xlabel("epoch")
        axes.set_ylabel("k-NN accuracy, %")
        axes.set_title("dashed: untrained model; dotted: raw pixels")
    last = measured[-1]
    return Picture(
        name="accuracy",
        title="k-NN accuracy",
        alt=f"k-NN accuracy (k = 20) at epoch {last['epoch']:g}: {100 * last['knn_top1']:.1f} %",
        figure=figure,
    )
