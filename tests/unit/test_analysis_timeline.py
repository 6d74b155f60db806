"""A life of a run, put together from events that were written and checkpoints that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
from analysis_samples import make_run, row, tiny_state
from runs_samples import sample_attempt

from dino_exp.analysis.analyzer import CheckpointAnalyzer
from dino_exp.analysis.figures.timeline import draw_timeline
from dino_exp.analysis.history import read_history

T = "2026-01-01T00:00:{:02d}.000000Z"


def event(second: int, kind: str, **fields: object) -> dict[str, object]:
    return {"time": T.format(second), "kind": kind, **fields}


LIFE = [
    event(0, "attempt_started", attempt=1, pid=1, host="a"),
    event(1, "saved", step=10, reasons=["epoch 1"], bytes=10),
    event(2, "saved", step=20, reasons=["epoch 2"], bytes=10),
    event(3, "saved", step=30, reasons=["epoch 3"], bytes=10),
    event(4, "dropped", step=10, reason="drop: older than last 2"),
    event(5, "attempt_started", attempt=2, pid=2, host="a"),
    event(6, "quarantined", step=30, reason="bad digest", folder="q"),
    event(7, "resumed", step=20, lost_steps=10),
    event(8, "skipped", step=25, reasons=["every"], under_way=20),
    event(9, "saved", step=40, reasons=["epoch 4", "end"], bytes=10),
    event(10, "attempt_ended", attempt=2, outcome="completed", signal=None),
]
ATTEMPTS = (
    sample_attempt(1, started_at=T.format(0), outcome="interrupted"),
    sample_attempt(2, started_at=T.format(5), ended_at=T.format(10), outcome="completed", resumed_from=20),
)


@pytest.fixture
def run(tmp_path: Path) -> CheckpointAnalyzer:
    states = {20: tiny_state(1.0), 40: tiny_state(2.0)}
    paths = make_run(tmp_path / "run", states, events=LIFE, attempts=ATTEMPTS, rows=[row(20, loss=1.0)])
    return CheckpointAnalyzer(paths.directory)


def test_attempts_kills_and_steps_done_again(run: CheckpointAnalyzer) -> None:
    first, second = run.timeline().spans
    assert (first.begin, first.end, first.was_killed, first.outcome) == (0, 30, True, "interrupted")
    assert (second.begin, second.end, second.was_killed, second.rolled_back) == (20, 40, False, 10)


KILLED_TWICE = [
    event(0, "attempt_started", attempt=1, pid=1, host="a"),
    event(1, "saved", step=10, reasons=["epoch 1"], bytes=10),
    event(9, "attempt_started", attempt=2, pid=2, host="a"),  # killed while it imported
    event(10, "pruned", freed_bytes=1),
    event(11, "attempt_started", attempt=3, pid=3, host="a"),
    event(12, "resumed", step=10, lost_steps=0, reached=17),
]


def test_rows_that_a_resume_cut_away_were_steps_too(tmp_path: Path) -> None:
    attempts = (
        sample_attempt(1, started_at=T.format(0), outcome="interrupted"),
        sample_attempt(2, started_at=T.format(9), outcome="interrupted"),
        sample_attempt(3, started_at=T.format(11), resumed_from=10),
    )
    rows = [row(step, loss=1.0) for step in range(13)]
    paths = make_run(tmp_path / "run", events=KILLED_TWICE, attempts=attempts, rows=rows, state="running", step=10)
    with paths.metrics.open("a") as metrics:
        metrics.write('{"step": 13, "lo')  # a torn row is none
    first, second, third = CheckpointAnalyzer(paths.directory).timeline().spans
    assert (first.begin, first.end, first.was_killed, first.last_heard_at) == (0, 17, True, T.format(1))
    assert (second.end, second.was_killed, second.rolled_back, second.last_heard_at) == (0, True, 0, None)
    assert (third.begin, third.end, third.rolled_back, third.last_heard_at) == (10, 12, 7, T.format(12))


def test_an_attempt_that_began_again_did_all_steps_again(tmp_path: Path) -> None:
    told = [
        event(0, "attempt_started", attempt=1),
        event(1, "attempt_started", attempt=2),
        event(2, "began_again", reached=8),
    ]
    attempts = (sample_attempt(1, outcome="interrupted"), sample_attempt(2))
    paths = make_run(tmp_path / "run", events=told, attempts=attempts, rows=[row(3, loss=1.0)], step=0)
    made = CheckpointAnalyzer(paths.directory).timeline()
    assert [(span.end, span.rolled_back) for span in made.spans] == [(8, 0), (3, 8)]
    assert made.incidents == ()


def test_what_was_saved_is_here_or_says_why_it_went(run: CheckpointAnalyzer) -> None:
    saves = {save.step: save for save in run.timeline().saves}
    assert sorted(saves) == [10, 20, 30, 40]
    assert saves[10].dropped_because == "older than last 2"
    assert saves[30].dropped_because == "damaged: bad digest"
    assert (saves[20].is_here, saves[40].is_here) == (True, True)
    assert "latest" in saves[40].kinds
    assert saves[40].reasons == ("epoch 4", "end")
    assert saves[40].alone_bytes > 0


def test_mishaps_in_words(run: CheckpointAnalyzer) -> None:
    told = [incident.text for incident in run.timeline().incidents]
    assert told == [
        "step 30 was damaged and is set aside: bad digest",
        "no save at step 25: the one of step 20 was still being written",
    ]


def test_a_running_attempt_was_not_killed(tmp_path: Path) -> None:
    record = {"attempts": (sample_attempt(1),), "state": "running"}
    paths = make_run(tmp_path / "run", events=LIFE[:2], **record)
    analyzer = CheckpointAnalyzer(paths.directory)
    assert analyzer.state == "interrupted"  # nobody holds its lock
    assert analyzer.timeline().spans[0].was_killed
    analyzer.__dict__["state"] = "running"
    assert not analyzer.timeline().spans[0].was_killed


def test_events_of_strangers_are_passed_over(tmp_path: Path) -> None:
    odd = [event(0, "saved", step="x"), event(1, "saved", step=-3), {"kind": 7}, event(2, "dropped"), {"time": 3}]
    paths = make_run(tmp_path / "run", events=odd)
    made = CheckpointAnalyzer(paths.directory).timeline()
    assert made.saves == ()
    assert made.incidents == ()


def test_damaged_events_are_shown_up_to_the_damage(run: CheckpointAnalyzer) -> None:
    lines = run.paths.events.read_text().splitlines()
    run.paths.events.write_text("\n".join([*lines[:3], "{torn", *lines[3:]]) + "\n")
    made = CheckpointAnalyzer(run.directory).timeline()
    assert made.problem is not None
    assert "line 4" in made.problem
    assert [save.step for save in made.saves] == [10, 20, 40]  # 40 by its manifest


@pytest.mark.parametrize("states", [{}, {40: tiny_state(1.0)}])
def test_a_picture_of_little(tmp_path: Path, states: dict) -> None:
    paths = make_run(tmp_path / "run", states)
    analyzer = CheckpointAnalyzer(paths.directory)
    picture = draw_timeline(analyzer.timeline(), "knn_top1", analyzer.history.series("knn_top1"), None)
    assert f"{len(states)} checkpoints were saved" in picture.alt
    assert "knn_top1 was not measured yet" in picture.svg()


def test_the_picture_reaches_to_the_last_metric(tmp_path: Path) -> None:
    rows = [row(10, knn_top1=0.5), row(90, knn_top1=0.75)]
    paths = make_run(tmp_path / "run", {10: tiny_state(1.0)}, rows=rows, attempts=(), step=10)
    paths.metrics.write_text(paths.metrics.read_text() + "{}\n")  # damaged: no last row, but what is before it is drawn
    analyzer = CheckpointAnalyzer(paths.directory)
    picture = draw_timeline(analyzer.timeline(), "knn_top1", analyzer.history.series("knn_top1"), None)
    assert picture.figure.axes[0].get_xlim()[1] > 9


def test_history_reads_numbers_and_words_for_numbers(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", rows=[row(10, loss=1.5, knn_top1="nan"), row(20, loss="inf", name="text")])
    found = read_history(paths.metrics)
    assert found.num_rows == 2
    assert list(found.series("loss").values) == [1.5, float("inf")]
    assert len(found.series("knn_top1").finite) == 0
    assert "name" not in found.columns
    assert list(found.wall["images_per_sec"].values) == [110.0, 120.0]
    assert found.latest("absent") is None


def test_history_of_a_damaged_file_has_the_rows_before_it(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", rows=[row(10, loss=1.5), row(20, loss=1.0)])
    paths.metrics.write_text(paths.metrics.read_text() + "{}\n" + '{"step": 30')
    found = read_history(paths.metrics)
    assert (found.num_rows, len(found.series("loss"))) == (2, 2)
    assert found.problem is not None


def test_thinning_a_curve_keeps_its_peaks(tmp_path: Path) -> None:
    rows = [row(step, loss=100.0 if step == 777 else 1.0) for step in range(2000)]
    series = read_history(make_run(tmp_path / "run", rows=rows).metrics).series("loss")
    thinned = series.thinned(100)
    assert len(thinned) <= 102
    assert thinned.values.max() == 100.0
    assert (thinned.steps[0], thinned.steps[-1]) == (0, 1999)
