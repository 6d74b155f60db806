"""The report of odd runs: each has all chapters, and says what is missing instead of failing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from analysis_samples import make_run, row, save_states, tiny_state
from config_examples import config
from runs_samples import sample_attempt
from support.checkpoints import flip, pack_of
from test_analysis_page import read

from dino_exp.analysis.analyzer import CheckpointAnalyzer
from dino_exp.analysis.figures.curves import draw_health
from dino_exp.analysis.history import History, Series
from dino_exp.analysis.page.document import Alarm, Block, Command, Document, Figure, Folded, Text, Tiles
from dino_exp.analysis.page.html import to_html
from dino_exp.analysis.page.markdown import to_markdown
from dino_exp.analysis.plan import ReportPlan
from dino_exp.analysis.run_report import chosen_steps, make_report
from dino_exp.dino.collapse import DOMINANCE_RATIO, MAX_DIVERGENCE, UNIFORM_RATIO
from dino_exp.errors import CorruptCheckpointError, UsageError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import Best, FailedSave

CHAPTERS = ["Summary", "Health", "Timeline", "Weights", "Storage", "Settings", "Identity", "Go on from here"]


def report(paths: RunPaths, plan: ReportPlan | None = None, **options: Any) -> Document:
    return make_report(CheckpointAnalyzer(paths.directory), plan or ReportPlan(), now_secs=1.8e9, **options)


def drawn(paths: RunPaths) -> Document:
    """The same, also written as a page, which must be well formed whatever is in it, and as Markdown."""
    made = report(paths)
    read(to_html(made))
    assert to_markdown(made, "p")
    return made


def flat(blocks: Sequence[Block]) -> list[Block]:
    return [inner for block in blocks for inner in (block, *(flat(block.blocks) if isinstance(block, Folded) else ()))]


def alarms(made: Document) -> list[str]:
    return [block.text for section in made.sections for block in flat(section.blocks) if isinstance(block, Alarm)]


def texts(made: Document) -> str:
    return " ".join(
        block.text for section in made.sections for block in flat(section.blocks) if isinstance(block, Text | Alarm)
    )


def commands(made: Document) -> str:
    return "\n".join(
        block.line for section in made.sections for block in flat(section.blocks) if isinstance(block, Command)
    )


def tiles(made: Document) -> dict[str, str]:
    return {
        tile.name: tile.value for block in made.sections[0].blocks if isinstance(block, Tiles) for tile in block.tiles
    }


def test_a_whole_run(tmp_path: Path) -> None:
    rows = [row(step, loss=5.0 - step / 10, knn_top1=step / 50, entropy_ratio=0.5, kl=0.8) for step in (10, 20, 30, 40)]
    states = {step: tiny_state(float(step)) for step in (20, 40)}
    best = Best(step=40, metric="knn_top1", value=0.8)
    made = drawn(make_run(tmp_path / "run", states, rows=rows, best=best, config=config(), note="mine"))
    assert [section.title for section in made.sections] == CHAPTERS
    assert alarms(made) == []
    assert made.refresh_secs is None
    assert tiles(made)["epoch"] == "4 of 10"
    assert tiles(made)["best knn_top1"] == "80.0 %"
    assert made.subtitle == "mine"
    assert "run@best --to teacher.safetensors" in commands(made)
    assert "run@best" in commands(made).partition("fork=")[2].splitlines()[0]
    names = [picture.name for picture in made.pictures()]
    assert names == ["accuracy", "loss", "health", "drive", "timeline", "evolution", "storage"]


def test_a_run_of_which_there_is_nothing_yet(tmp_path: Path) -> None:
    best = Best(step=10, metric="knn_top1", value=0.5)  # measured, and killed before it was saved
    made = drawn(make_run(tmp_path / "run", attempts=(), step=0, best=best))
    assert "@" not in commands(made)
    assert [section.title for section in made.sections] == CHAPTERS
    assert "No row of metrics" in texts(made)
    assert "There is no checkpoint to measure yet" in texts(made)
    assert "No checkpoint has been saved yet" in texts(made)
    assert tiles(drawn(make_run(tmp_path / "none", attempts=(), step=0)))["best knn_top1"] == "–"


def test_one_checkpoint_and_no_best(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", rows=[row(10, loss=1.0)], config=config())
    save_states(paths.checkpoints, {10: tiny_state(1.0)}, {10: {}})
    made = drawn(paths)
    assert "There is one checkpoint" in texts(made)
    assert "@best" not in commands(made)
    assert "run@latest --to teacher.safetensors" in commands(made)
    assert alarms(made) == []


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [row(10, loss="nan", knn_top1="nan", kl="inf", entropy_ratio=0.5), row(20, loss="nan", knn_top1="nan")]
    made = drawn(make_run(tmp_path / "run", {10: tiny_state(math.nan)}, rows=rows, config=config()))
    assert any("no numbers" in alarm and "knn_top1" in alarm for alarm in alarms(made))
    rows = [row(10, loss=4.25, knn_top1=0.5, kl=0.5, entropy_ratio=0.4), row(20, loss="nan", knn_top1="nan", kl="inf")]
    alts = {picture.name: picture.alt for picture in report(make_run(tmp_path / "ends", rows=rows)).pictures()}
    assert alts["accuracy"] == "k-NN accuracy with k = 20 is no number at the end, after 50.0 % at step 10."
    assert alts["loss"] == "Loss: training is no number at the end, after 4.25 at step 10."
    assert alts["health"].startswith("Teacher entropy over ln K is 0.40 at the end; the divergence is no number")


def test_all_bounds_of_a_collapse_are_drawn() -> None:
    series = Series(np.array([1.0]), np.array([0.7]))
    entropy, kl, *_ = draw_health(History({"entropy_ratio": series, "kl": series}), 10).figure.axes
    assert [patch.get_y() for patch in entropy.patches] == [UNIFORM_RATIO]
    assert list(entropy.lines[-1].get_ydata()) == [DOMINANCE_RATIO, DOMINANCE_RATIO]
    assert [patch.get_height() for patch in kl.patches] == [MAX_DIVERGENCE]


def test_a_collapsed_model_is_called_so(tmp_path: Path) -> None:
    made = report(make_run(tmp_path / "run", rows=[row(10, loss=4.8, entropy_ratio=0.99, kl=0.01)]))
    assert any("looks collapsed (uniform)" in alarm for alarm in alarms(made))


def test_a_run_that_is_still_going_refreshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_run(tmp_path / "run", state="running", rows=[row(10, loss=1.0)])
    assert report(paths).refresh_secs is None  # nobody holds its lock
    assert any("killed or aborted" in alarm for alarm in alarms(report(paths)))
    monkeypatch.setattr("dino_exp.analysis.analyzer.probe", lambda *_, **__: object())
    assert report(paths).refresh_secs == 20


def test_the_time_of_killed_attempts_counts_though_their_checkpoints_went(tmp_path: Path) -> None:
    at = "2026-01-01T00:{:02d}:00.000000Z".format
    attempts = (
        sample_attempt(1, started_at=at(0), outcome="interrupted"),
        sample_attempt(2, started_at=at(30), ended_at=at(35), outcome="completed", resumed_from=10),
    )
    events = [
        {"time": at(0), "kind": "attempt_started", "attempt": 1},
        {"time": at(20), "kind": "saved", "step": 10, "reasons": []},
        {"time": at(25), "kind": "pruned", "freed_bytes": 1},
        {"time": at(30), "kind": "attempt_started", "attempt": 2},
        {"time": at(34), "kind": "dropped", "step": 10, "reason": "drop: old"},
    ]
    paths = make_run(tmp_path / "run", {40: tiny_state(1.0)}, attempts=attempts, events=events)
    assert tiles(report(paths))["time"] == "25m 00s"


def test_a_damaged_checkpoint_is_shown_as_such(tmp_path: Path) -> None:
    states = {step: tiny_state(float(step)) for step in (10, 20, 30)}
    paths = make_run(tmp_path / "run", states, config=config())
    flip(pack_of(paths.checkpoints, 20), -3)
    (alarm,) = alarms(report(paths))
    assert alarm.startswith("The checkpoint of step 20 is damaged")
    torn = paths.checkpoints / "step-000000010.json"
    torn.write_bytes(torn.read_bytes()[:-9])
    found = alarms(report(paths))
    assert any("1 checkpoint cannot be read" in alarm for alarm in found)
    assert any("step 10 is damaged" in alarm for alarm in found)


def test_files_that_are_damaged_hide_only_their_chapter(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", {10: tiny_state(1.0)}, rows=[row(10, loss=1.0)], config=config())
    paths.config_yaml.write_text("{")
    paths.environment.write_text("[")
    made = report(paths)
    assert [section.title for section in made.sections] == CHAPTERS
    assert sum("This cannot be shown" in alarm for alarm in alarms(made)) == 2


def test_failures_and_a_full_disk_are_told(tmp_path: Path) -> None:
    attempts = (sample_attempt(1, outcome="failed", error="loss is not finite"),)
    failed = FailedSave(step=30, error="no space left", at="2026-01-01T00:00:00Z")
    made = report(make_run(tmp_path / "run", state="failed", attempts=attempts, failed_save=failed))
    assert any("loss is not finite" in alarm for alarm in alarms(made))
    assert any("no space left" in alarm for alarm in alarms(made))


def test_an_attempt_that_was_not_exact_says_why(tmp_path: Path) -> None:
    attempts = (sample_attempt(1, outcome="completed", exact=False, why_not_exact=("threads was 1, is 2",)),)
    assert any(
        "not every attempt" in alarm.lower() for alarm in alarms(report(make_run(tmp_path / "run", attempts=attempts)))
    )


def test_many_checkpoints_are_sampled_with_first_last_and_best(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run")
    metrics = {step: {"knn_top1": 0.9 if step == 130 else 0.1} for step in range(10, 310, 10)}
    states = {step: tiny_state(1.0, moments=False) for step in metrics}
    save_states(paths.checkpoints, states, metrics, keep=keep_all())
    run = CheckpointAnalyzer(paths.directory)
    steps = chosen_steps(run, ReportPlan(most_checkpoints=5))
    assert {10, 130, 300} <= set(steps)
    assert len(steps) <= 6
    assert chosen_steps(run, ReportPlan(most_bytes=10)) == []
    made = report(paths, ReportPlan(most_checkpoints=5))
    assert "of 30 checkpoints, evenly spread" in texts(made)
    assert "too large to be read" in texts(report(paths, ReportPlan(most_bytes=10)))
    assert "--most 1 leaves too few" in texts(report(paths, ReportPlan(most_checkpoints=1)))


def keep_all() -> Any:
    from dino_exp.checkpoint.policies import BestN, KeepAny, LatestN

    return KeepAny((LatestN(1000), BestN("knn_top1")))


def test_a_chapter_that_looks_into_the_model_may_fail_alone(tmp_path: Path) -> None:
    paths = make_run(tmp_path / "run", {10: tiny_state(1.0)}, config=config())

    def look(_: CheckpointAnalyzer) -> Sequence[Block]:
        raise CorruptCheckpointError("torn")

    made = report(paths, look=look)
    assert "What it sees" in [section.title for section in made.sections]
    assert "This cannot be shown: torn" in alarms(made)


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        make_report(CheckpointAnalyzer(tmp_path), ReportPlan())


def test_pictures_have_alternatives(tmp_path: Path) -> None:
    made = report(make_run(tmp_path / "run", {10: tiny_state(1.0)}, rows=[row(10, loss=1.0)]))
    figures = [block for section in made.sections for block in flat(section.blocks) if isinstance(block, Figure)]
    assert all(figure.picture.alt.endswith(".") for figure in figures)
    assert len({figure.picture.name for figure in figures}) == len(figures)
