"""What became of sweeps: `dino-exp sweeps`, their tables, pages and pictures, without any training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from catalogue_samples import make
from cli_samples import cli, contents
from sweep_samples import KEY, job, sweep, sweeps, two_sweeps

from dino_exp.errors import UsageError
from dino_exp.processes import ChildEnd
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import Best
from dino_exp.sweeps.outcome import outcomes_of
from dino_exp.sweeps.page import sweep_document
from dino_exp.sweeps.picture import draw_sweep
from dino_exp.sweeps.record import load_sweep, save_sweep, sweep_path


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    return two_sweeps(tmp_path)


def test_list(outputs: Path) -> None:
    before = contents(outputs)
    rows = sweeps("list", "--outputs", outputs, "--json").json
    assert [(row["name"], row["num_jobs"]) for row in rows] == [("second", 1), ("first", 4)]
    assert rows[1]["states"] == {"completed": 1, "failed": 1, "not begun": 2}
    assert "1 completed, 1 failed, 2 not begun" in sweeps("list", "--outputs", outputs).out
    assert contents(outputs) == before
    assert sweeps("list", "--outputs", outputs / "nowhere").out.startswith("no sweep below")
    sweep_path(outputs, "first").write_text("{")
    assert len(sweeps("list", "--outputs", outputs).lines) == 2
    sweep_path(outputs, "second").write_text("{")
    none = sweeps("list", "--outputs", outputs)
    assert (none.code, none.out, none.err.count("not strict JSON")) == (4, "", 2)
    assert sweeps("list", "--outputs", outputs, "--json").json == []


def test_show(outputs: Path) -> None:
    found = sweeps("show", "fi", "--outputs", outputs, "--json").json
    assert [one["state"] for one in found["jobs"]] == ["completed", "failed", None, None]
    assert [one["error"] for one in found["jobs"]] == [None, "it broke", None, "no such seed"]
    assert found["jobs"][1]["command"] == "python -m dino_exp.train model=vit_nano seed=1"
    printed = sweeps("show", "first", "--outputs", outputs).out
    assert f"job 1 again: python -m dino_exp.train model=vit_nano seed=1 (traceback in {outputs}" in printed
    assert "job 3 again" in printed
    assert "job 2 again" not in printed
    assert sweeps("show", "last", "--outputs", outputs, "--json").json["name"] == "second"


@pytest.mark.parametrize("verb", ["show", "resume", "report"])
def test_an_unknown_sweep_is_told_with_those_there_are(verb: str, outputs: Path) -> None:
    found = sweeps(verb, "third", "--outputs", outputs)
    assert (found.code, found.out) == (2, "")
    assert "there are: first, second" in found.err


def test_report(outputs: Path) -> None:
    lines = sweeps("report", "first", "--outputs", outputs).lines
    assert lines[4] == "| seed | knn_top1 | loss | kept | a kill costs at most | state | run |"
    assert [line.split(" | ")[0] for line in lines[6:10]] == ["| 0", "| 1", "| 2", "| -1"]
    assert [line.split(" | ")[1] for line in lines[6:10]] == ["0.5000", "–", "–", "–"]  # 1 has failed
    by_loss = sweeps("report", "first", "--metric", "loss", "--outputs", outputs).lines
    assert by_loss[4].startswith("| seed | loss | knn_top1 | kept |")
    assert "no job has it" in sweeps("report", "first", "--metric", "x", "--outputs", outputs).err


def test_the_report_has_the_states_of_show_and_the_reasons_below(outputs: Path) -> None:
    shown = sweeps("show", "first", "--outputs", outputs).lines[1:5]
    lines = sweeps("report", "first", "--outputs", outputs).lines
    states = [line.split(" | ")[5] for line in lines[6:10]]
    assert states == ["completed", "failed", "not begun", "not begun"]
    assert all(state in line for state, line in zip(states, shown, strict=True))
    assert lines[10:] == ["", "- seed=1: it broke", "- seed=-1: no such seed"]


def test_a_job_that_could_not_begin_is_not_drawn_as_collapsed(outputs: Path) -> None:
    record = load_sweep(sweep_path(outputs, "first"))
    assert record is not None
    done, failed, _, wrong = outcomes_of(record, outputs)
    assert draw_sweep([done, wrong], "loss").alt == "The lowest mean loss is 2, with seed 0."
    for jobs, title in (([done, wrong], ""), ([done, failed, wrong], "✕ failed or collapsed")):
        assert draw_sweep(jobs, "loss").figure.axes[0].get_title("left") == title


def test_the_report_tells_what_a_policy_keeps_and_what_a_kill_costs(outputs: Path) -> None:
    run = make(outputs, "p", 0.1, 0.2, step=9)
    (run / "events.jsonl").write_text('{"kind": "saved", "step": 1}\n{"kind": "saved", "step": 2}\n')
    save_sweep(sweep_path(outputs, "third"), sweep(job("p", "seed=0"), name="third"))
    (line,) = sweeps("report", "third", "--metric", "knn_top1", "--outputs", outputs).lines[6:]
    assert " MB | 7 steps | stopped | " in line
    (run / "events.jsonl").write_text("{\n")
    (line,) = sweeps("report", "third", "--outputs", outputs).lines[6:]
    assert "cannot be read" in line


def test_pictures(outputs: Path) -> None:
    for name, suffix in (("first", "png"), ("first", "svg")):
        file = outputs / f"{name}.{suffix}"
        assert sweeps("report", name, "--picture", file, "--outputs", outputs).code == 0
        assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")
    pairs = [job("a", "lr=1", "m=1"), job("b", "lr=1", "m=2"), job("c", "lr=2", "m=1")]
    save_sweep(sweep_path(outputs, "map"), sweep(*pairs, name="map"))
    assert sweeps("report", "map", "--picture", outputs / "map.pdf", "--outputs", outputs).code == 0
    assert "ends in .svg" in sweeps("report", "map", "--picture", outputs / "map.txt", "--outputs", outputs).err
    found = sweeps("report", "second", "--picture", outputs / "x.png", "--outputs", outputs)
    assert "0 settings were swept" in found.err


def test_a_job_that_failed_at_once_has_failed(outputs: Path) -> None:
    paths = RunPaths(outputs / "runs" / f"{KEY}-c")
    paths.directory.mkdir()
    events = '{"kind": "attempt_started"}\n{"kind": "attempt_ended", "outcome": "failed", "error": "no GPU"}\n'
    paths.events.write_text(events)
    paths.failed.write_text("Traceback")
    found = sweeps("show", "first", "--outputs", outputs)
    assert f"job 2 again: python -m dino_exp.train model=vit_nano seed=2 (traceback in {paths.failed})" in found.out
    told = sweeps("show", "first", "--outputs", outputs, "--json").json["jobs"][2]
    assert (told["state"], told["error"]) == ("failed", "no GPU")
    assert sweeps("report", "first", "--outputs", outputs).code == 0
    found = cli("doctor", "--outputs", outputs, "--json", noun="runs")
    assert f"failed at once (traceback in {paths.failed}) before there was anything" in found.out
    paths.events.write_text(events + '{"kind": "attempt_started"}\n')  # tried again, and killed
    assert sweeps("show", "first", "--outputs", outputs, "--json").json["jobs"][2]["state"] is None


def test_resume_types_what_was_typed_for_hydra_too(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("dino_exp.cli.sweeps.run_child", lambda command: ran.append(command[3:]) or ChildEnd(0))
    made = sweep(job("a", "seed=0"), name="joblib")
    made = replace(made, options=("--config-dir", "/c"), launch=("hydra/launcher=joblib",))
    save_sweep(sweep_path(outputs, "joblib"), made)
    found = sweeps("resume", "joblib", "--outputs", outputs)
    words = ["--multirun", "--config-dir", "/c", "hydra/launcher=joblib", "seed=0,1"]
    assert ran == [[*words, f"paths.outputs={outputs}", "sweep.name=joblib"]]
    assert found.err.startswith(f"$ python -m dino_exp.train {' '.join(words)} paths.outputs=")
    line = f"python -m dino_exp.train {' '.join(words)}"
    assert sweeps("report", "joblib", "--outputs", outputs).lines[2] == f"    {line}"
    page = (outputs / "sweeps" / "joblib" / "report.html").read_text()
    assert f"dino-exp sweeps resume joblib --outputs {outputs}" in page
    assert line in page


@pytest.mark.parametrize(
    ("ends", "code", "num_well"),
    [([ChildEnd(130, (2,))], 130, 0), ([ChildEnd(-9), ChildEnd(0)], 1, 1), ([ChildEnd(0), ChildEnd(0)], 0, 2)],
)
def test_an_interrupt_ends_the_retries_of_failed_jobs(
    ends: list[ChildEnd], code: int, num_well: int, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(ends)
    monkeypatch.setattr("dino_exp.cli.sweeps.run_child", lambda _: left.pop(0))
    found = sweeps("resume", "first", "--failed", "--outputs", outputs)
    assert (found.code, left) == (code, [])
    assert found.out == f"{num_well} of 2 jobs that had failed ended well\n"


def test_a_job_that_failed_has_no_rank_and_no_part_in_a_mean(outputs: Path) -> None:
    record = load_sweep(sweep_path(outputs, "first"))
    assert record is not None
    outcomes = outcomes_of(record, outputs)
    document = sweep_document(record, outcomes, "knn_top1", outputs=outputs, now_secs=0)
    text = str(document)
    assert "0.7" not in text
    assert "from – to', value='0.5 – 0.5'" in text
    with pytest.raises(UsageError, match="no job has it"):
        draw_sweep(outcomes[2:], "loss")
    collapsed = draw_sweep(outcomes[1:], "loss")  # what it had come to is drawn, and crossed out
    assert collapsed.alt == "Every job that has loss failed at 1 place."
    (line, *_) = collapsed.figure.axes[0].lines
    assert list(line.get_ydata()) == [1.0]
    assert draw_sweep(outcomes, "loss").alt == "The lowest mean loss is 2, with seed 0; jobs failed at 1 place."
    assert draw_sweep(outcomes[:2], "knn_top1").alt.endswith("; jobs failed at 1 place.")


def test_without_a_metric_it_is_what_the_jobs_are_judged_by(outputs: Path) -> None:
    best = Best(step=3, metric="val_loss", value=1.0)
    judged: dict[str, Any] = {"metrics": {"loss": 1.0, "val_loss": 1.5, "knn_top1": 0.1}, "best": best}
    for variant, changes in {"k": {"metrics": {"loss": 2.0}}, "v": judged}.items():
        make(outputs, variant, state="completed", **changes)
        save_sweep(sweep_path(outputs, f"by-{variant}"), sweep(job(variant, "seed=0"), name=f"by-{variant}"))
    assert sweeps("report", "by-k", "--outputs", outputs).lines[4].startswith("| loss | kept |")
    assert (outputs / "sweeps" / "by-k" / "report.html").exists()
    assert sweeps("report", "by-v", "--outputs", outputs).lines[4].startswith("| val_loss | knn_top1 | loss |")


def test_a_fork_loses_no_steps_of_its_parent(outputs: Path) -> None:
    run = make(outputs, "f", 0.1, 0.2, step=45, parent={"run_key": "p", "step": 40})
    (run / "events.jsonl").write_text('{"kind": "saved", "step": 40}\n{"kind": "saved", "step": 43}\n')
    save_sweep(sweep_path(outputs, "forks"), sweep(job("f", "seed=0"), name="forks"))
    assert " MB | 3 steps | " in sweeps("report", "forks", "--metric", "knn_top1", "--outputs", outputs).lines[6]


def test_nothing_has_failed(outputs: Path) -> None:
    assert sweeps("resume", "second", "--failed", "--outputs", outputs).out == "no job of second has failed\n"
