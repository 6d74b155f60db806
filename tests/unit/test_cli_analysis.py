"""`dino-exp checkpoints evolution|compare|timeline|report` and `runs compare`, as they are typed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from analysis_samples import PROTOTYPES, QKV, make_run, row, tiny_state
from cli_samples import cli, contents
from config_examples import config
from runs_samples import KEY, sample_attempt
from support.checkpoints import flip, pack_of

from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import Best

STATES = {10: tiny_state(1.0), 20: tiny_state(2.0, gap=3.0)}
ROWS = [row(10, loss=2.0, knn_top1=0.5), row(20, loss=1.0, knn_top1=0.75)]
EVENTS = [
    {"time": "2026-01-01T00:00:01.000000Z", "kind": "saved", "step": 5, "reasons": ["every"]},
    {"time": "2026-01-01T00:00:02.000000Z", "kind": "dropped", "step": 5, "reason": "drop: too old"},
]


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    best = Best(step=20, metric="knn_top1", value=0.75)
    return make_run(
        tmp_path / "outputs" / "runs" / KEY, STATES, rows=ROWS, events=EVENTS, config=config(), best=best, step=20
    )


def test_evolution_as_a_table_json_and_picture(run: RunPaths, tmp_path: Path) -> None:
    before = contents(run.directory)
    told = cli("evolution", run.directory)
    assert told.code == 0
    assert told.lines[0].split()[:3] == ["step", "epoch", "norm"]
    assert "5.19615" in told.lines[1]  # √27
    assert "1 of 3" in told.lines[2]
    assert any(line.startswith(QKV) for line in told.lines)
    found = cli("evolution", run.directory, "--json", "--picture", tmp_path / "e.svg").json
    assert [moment["step"] for moment in found] == [10, 20]
    assert found[1]["total"]["relative_change"] == pytest.approx(1.0)
    assert found[1]["spectra"][QKV]["spectral_norm"] == pytest.approx(8.0)
    assert "<svg" in (tmp_path / "e.svg").read_text()
    assert contents(run.directory) == before


def test_evolution_of_one_block_and_one_weight(run: RunPaths) -> None:
    told = cli("evolution", run.directory, "--block", "head.last_layer", "--weight", PROTOTYPES)
    assert "1.41421" in told.lines[1]
    assert not any(line.startswith(QKV) for line in told.lines)
    wrong = cli("evolution", run.directory, "--block", "head")
    assert (wrong.code, "there are backbone.blocks.0, head.last_layer" in wrong.err) == (2, True)
    wrong = cli("evolution", run.directory, "--weight", "qkv")
    assert (wrong.code, "--weight qkv: no such weight matrix" in wrong.err) == (2, True)
    assert cli("evolution", run.directory, "--picture", "x.jpg").code == 2
    assert cli("evolution", f"{run.directory}@best").code == 2


def test_evolution_of_nothing_and_of_damage(tmp_path: Path, run: RunPaths) -> None:
    empty = make_run(tmp_path / "empty")
    picture = tmp_path / "new" / "e.svg"
    told = cli("evolution", empty.directory, "--picture", picture)
    assert told.lines == ["no checkpoints yet", f"picture: {picture}"]
    assert picture.exists()
    flip(pack_of(run.checkpoints, 20), -3)
    told = cli("evolution", run.directory)
    assert told.code == 0
    assert "damaged" in told.lines[2]
    assert told.lines[-1].startswith("step 20 is damaged: ")


def test_compare_two_checkpoints(run: RunPaths, tmp_path: Path) -> None:
    told = cli("compare", f"{run.directory}@10", run.directory)
    assert told.lines[0].startswith("A: step 10")
    assert told.lines[1].startswith("B: step 20")
    assert told.lines[4].startswith(f"teacher.{QKV}")
    assert not any(line.startswith("optimizer.") for line in told.lines)
    found = cli("compare", f"{run.directory}@10", f"{run.directory}@20", "--json", "--picture", tmp_path / "c.png").json
    assert found["equal"] is False
    assert found["a"]["step"] == 10
    change = next(one for one in found["tensors"] if one["name"] == f"student.{QKV}")
    assert (change["change"], change["relative"]) == (pytest.approx(5.0), pytest.approx(1.0))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_compare_equal_ones_parts_and_limits(run: RunPaths) -> None:
    assert "all 5 tensors are equal" in cli("compare", run.directory, run.directory).out
    told = cli("compare", f"{run.directory}@10", run.directory, "--part", "student", "--limit", "1")
    assert "1 of 2 tensors that differ; all: --limit 0" in told.out
    assert "1 tensor equal" in told.out
    told = cli("compare", f"{run.directory}@10", run.directory, "--part", "teacher", "--by", "change", "--json").json
    assert [one["name"] for one in told["tensors"]] == [f"teacher.{QKV}", f"teacher.{PROTOTYPES}"]
    assert len(cli("compare", f"{run.directory}@10", run.directory, "--json").json["tensors"]) == 8
    wrong = cli("compare", run.directory, run.directory, "--part", "optimizer", "--picture", "x.svg")
    assert (wrong.code, "layers of student or teacher" in wrong.err) == (2, True)
    wrong = cli("compare", run.directory, run.directory, "--part", "head")
    assert wrong.code == 2
    assert all(part in wrong.err.partition("there are")[2] for part in ("student", "teacher", "optimizer"))
    assert cli("compare", run.directory, f"{run.directory}@15").code == 4


def test_timeline_tells_what_is_here_and_what_went(run: RunPaths, tmp_path: Path) -> None:
    told = cli("timeline", run.directory)
    assert told.lines[-1].startswith("1 attempt; 2 checkpoints here")
    assert "1 dropped (--all shows them)" in told.lines[-1]
    assert not any("too old" in line for line in told.lines)
    assert any("too old" in line for line in cli("timeline", run.directory, "--all").lines)
    found = cli("timeline", run.directory, "--json", "--picture", tmp_path / "t.svg").json
    assert [(save["step"], save["is_here"]) for save in found["saves"]] == [(5, False), (10, True), (20, True)]
    assert found["spans"][0]["was_killed"] is True
    assert (tmp_path / "t.svg").exists()


def test_timeline_is_in_the_order_in_which_it_happened(tmp_path: Path) -> None:
    at = "2026-01-01T00:00:05.{:06d}Z".format
    attempts = (
        sample_attempt(1, started_at="2026-01-01T00:00:05Z", outcome="interrupted"),
        sample_attempt(2, started_at=at(300), outcome="interrupted", resumed_from=8),
        sample_attempt(3, started_at=at(400), outcome="completed", ended_at=at(900), resumed_from=8),
    )
    events = [
        {"time": at(1), "kind": "attempt_started", "attempt": 1},
        {"time": at(2), "kind": "saved", "step": 8, "reasons": ["every"]},
        {"time": at(3), "kind": "attempt_started", "attempt": 2},
        {"time": at(4), "kind": "attempt_started", "attempt": 3},
        {"time": at(5), "kind": "resumed", "step": 8, "lost_steps": 0, "reached": 13},
        {"time": at(800), "kind": "saved", "step": 44, "reasons": ["end"]},
    ]
    paths = make_run(tmp_path / "run", events=events, attempts=attempts, step=44)
    lines = [" ".join(line.split()) for line in cli("timeline", paths.directory, "--all").lines[1:-1]]
    assert [line.removeprefix("2026-01-01 00:00:05 ") for line in lines] == [
        "0 attempt 1 begins",
        "8 saved, dropped",
        "13 attempt 1 killed last heard of then",
        "8 attempt 2 begins 5 steps done again",
        "– 8 attempt 2 killed",
        "8 attempt 3 begins 5 steps done again",
        "44 saved, dropped",
        "44 attempt 3 completed",
    ]


def test_report_as_a_page_and_as_markdown(run: RunPaths, tmp_path: Path) -> None:
    told = cli("report", run.directory, "--no-model")
    assert told.code == 0
    assert "open it in a browser" in told.out
    assert (run.directory / "report.html").read_text().startswith("<!doctype html>")
    found = cli("report", run.directory, "--no-model", "--to", tmp_path / "notes" / "r.md", "--json")
    assert found.code == 0, found.err
    assert (tmp_path / "notes" / "r-pictures" / "timeline.svg").exists()
    assert len(found.json["files"]) == 8
    assert "![" in (tmp_path / "notes" / "r.md").read_text()


def test_files_go_only_where_they_can_be_written(run: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "x.svg").mkdir()
    before = contents(tmp_path)
    for words in (("timeline", "--picture"), ("evolution", "--picture"), ("report", "--no-model", "--to")):
        verb, *options = words
        suffix = ".html" if verb == "report" else ".svg"
        wrong = cli(verb, run.directory, *options, tmp_path / "file" / "deep" / f"x{suffix}")
        assert (wrong.code, f"{tmp_path / 'file'} is no folder; choose another" in wrong.err) == (2, True)
    wrong = cli("timeline", run.directory, "--picture", tmp_path / "x.svg")
    assert (wrong.code, "is a folder" in wrong.err) == (2, True)
    assert contents(tmp_path) == before
    assert cli("report", run.directory, "--no-model", "--to", tmp_path / "notes" / "r.html").code == 0


def test_report_refuses_what_is_no_page(run: RunPaths, tmp_path: Path) -> None:
    wrong = cli("report", run.directory, "--to", tmp_path / "r.pdf")
    assert (wrong.code, "expected a name that ends in .html or .md" in wrong.err) == (2, True)
    assert cli("report", f"{run.directory}@20").code == 2
    assert cli("report", tmp_path / "nowhere").code == 2


def test_runs_compare_names_runs_by_what_differs(run: RunPaths, tmp_path: Path) -> None:
    other = make_run(
        tmp_path / "other", rows=[row(10, loss=3.0, knn_top1="nan")], config=config("optimizer.lr=1e-3"), step=10
    )
    told = cli("compare", run.directory, other.directory, noun="runs")
    assert "lr 0.003" in told.lines[1]
    assert "0.75" in told.lines[1]
    assert "lr 0.001" in told.lines[2]
    picture = tmp_path / "runs.svg"
    found = cli(
        "compare", other.directory, run.directory, "--metric", "loss", "--json", "--picture", picture, noun="runs"
    )
    assert [one["best"] for one in found.json] == [1.0, 3.0]
    assert found.json[0]["steps"] == [10, 20]
    assert "lr 0.003" in picture.read_text()
    wrong = cli("compare", run.directory, "--metric", "speed", noun="runs")
    assert (wrong.code, "there are epoch, knn_top1, loss" in wrong.err) == (2, True)
    assert json.loads(cli("compare", run.directory, run.directory, "--json", noun="runs").out)[0]["name"] == KEY


def test_runs_compare_shortens_the_digest_of_an_origin_for_people(run: RunPaths, tmp_path: Path) -> None:
    origin = "s1:" + "0123456789abcdef" * 4
    other = make_run(tmp_path / "other", rows=ROWS, config=replace(config(), origin=origin))
    words, picture = ("compare", run.directory, other.directory), tmp_path / "runs.svg"
    told = cli(*words, "--picture", picture, noun="runs")
    assert "origin s1:01234567 " in told.out
    assert max(map(len, told.lines)) < 130
    assert "origin s1:01234567<" in picture.read_text()
    assert {one["name"] for one in cli(*words, "--json", noun="runs").json} == {"origin null", f"origin {origin}"}


def test_runs_compare_tells_copies_apart_and_takes_a_run_once(run: RunPaths, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / KEY
    shutil.copytree(run.directory, copy)
    again = run.directory / ".." / KEY
    picture = tmp_path / "copies.svg"
    told = cli("compare", run.directory, copy, again, "--json", "--picture", picture, noun="runs")
    assert [one["name"] for one in told.json] == [str(run.directory), str(copy)]
    assert picture.exists()


def test_runs_compare_names_three_settings_and_says_how_many_more(run: RunPaths, tmp_path: Path) -> None:
    changes = ("optimizer.lr=1e-3", "seed=5", "train.batch_size=8", "loss.center_momentum=0.8")
    other = make_run(tmp_path / "other", rows=ROWS, config=config(*changes))
    names = [one["name"] for one in cli("compare", run.directory, other.directory, "--json", noun="runs").json]
    assert all(name.count(",") == 2 and name.endswith(" and 1 more") for name in names)


def test_runs_compare_names_settings_as_they_are_typed(run: RunPaths, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", rows=ROWS, config=config("loss.use_bn=false", "train.stop_after_epochs=1"))
    words = (run.directory, other.directory, "--json", "--picture", tmp_path / "runs.svg")
    names = [one["name"] for one in cli("compare", *words, noun="runs").json]
    assert names == ["use_bn true, stop_after_epochs null", "use_bn false, stop_after_epochs 1"]
    assert "use_bn true" in (tmp_path / "runs.svg").read_text()


def test_timeline_says_that_an_attempt_was_not_exact(tmp_path: Path) -> None:
    attempts = (sample_attempt(1, outcome="completed", exact=False, why_not_exact=("threads was 1, is 2",)),)
    paths = make_run(tmp_path / "run", attempts=attempts)
    (line,) = [line for line in cli("timeline", paths.directory).lines if "attempt 1 begins" in line]
    assert line.endswith("attempt 1 begins  not exact")
