"""Names at the ends of lines: none over another, none outside of the picture, however close the lines end."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dino_exp.analysis.figures.curves import draw_accuracy
from dino_exp.analysis.figures.labels import spread_out
from dino_exp.analysis.figures.runs import RunCurve, draw_runs
from dino_exp.analysis.history import History, Series
from dino_exp.analysis.style import Picture
from dino_exp.runs.record import Best

STEPS = np.arange(1, 21) * 22.0


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([2.0, 8.0, 5.0], [2.0, 8.0, 5.0]),  # far enough
        ([5.0, 5.0], [4.5, 5.5]),
        ([5.0, 5.2, 5.1], [4.1, 6.1, 5.1]),
        ([10.0, 9.9, 9.8, 1.0], [10.0, 9.0, 8.0, 1.0]),  # down from the top
        ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0]),  # up from the bottom
    ],
)
def test_heights_are_moved_apart_and_stay_within(heights: list[float], expected: list[float]) -> None:
    assert spread_out(heights, 1.0, 0.0, 10.0) == pytest.approx(expected)


def curve(number: int, end: float = 0.9) -> RunCurve:
    values = end * (1 - np.exp(-STEPS / 60)) + 0.004 * np.sin(STEPS + number)
    name = f"seed {number}, lr 0.00{number}, a long setting"
    return RunCurve(name=name, series=Series(STEPS, values), per_epoch=22, best=float(values.max()), best_step=0)


def check(picture: Picture, *names: str) -> None:
    """Each name once, inside of the picture, over no other text that is annotated."""
    figure = picture.figure
    figure.draw_without_rendering()
    texts = [text for axes in figure.axes for text in axes.texts]
    assert sum(text.get_text().startswith(names) for text in texts) == len(names)
    boxes = [text.get_window_extent() for text in texts]
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 and box.y0 >= 0 for box in boxes)
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]


@pytest.mark.parametrize("num", [2, 12, 18])
def test_runs_that_end_close_together_keep_their_names(num: int) -> None:
    check(
        draw_runs([curve(number) for number in range(num)], "knn_top1", less_is_better=False),
        *(f"seed {number}," for number in range(num)),
    )


def test_accuracy_beside_baselines_that_are_near() -> None:
    def rising(end: float, by: float) -> Series:
        return Series(STEPS, end - by * np.exp(-STEPS / 100))

    columns = {
        "knn_top1": rising(0.985, 0.1), "knn_10shot": rising(0.972, 0.3), "knn_1shot": rising(0.955, 0.5),
        "pixel_knn_top1": Series(np.zeros(1), np.array([0.975])),
        "init_knn_top1": Series(np.zeros(1), np.array([0.965])),
    }  # fmt: skip
    best = Best(metric="knn_top1", value=0.985, step=440)
    names = ("k = 20", "10 labels", "1 label", "raw pixels", "untrained", "best 98.5")
    check(draw_accuracy(History(columns, 20), 22, best), *names)


@pytest.mark.parametrize("pixels", [0.967, 0.93])  # a line just above the best one, and one below it
def test_no_level_is_drawn_through_the_name_of_the_best(pixels: float) -> None:
    columns = {
        "knn_top1": Series(STEPS, 0.947 - 0.2 * np.exp(-STEPS / 40)),
        "pixel_knn_top1": Series(np.zeros(1), np.array([pixels])),
        "knn_1shot": Series(STEPS, 0.65 + STEPS / 10_000),
    }
    figure = draw_accuracy(History(columns), 22, Best(metric="knn_top1", value=0.947, step=330)).figure
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (name,) = [text for text in axes.texts if text.get_text().startswith("best")]
    box = name.get_window_extent()
    _, level = axes.transData.transform((0, 100 * pixels))
    assert not box.y0 <= level <= box.y1
