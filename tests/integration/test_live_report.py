"""The report that a training writes beside itself: there at the end, and harmless to it, whatever becomes of it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from support.runs import Lab, assert_same_end, events, record

from dino_exp.attempts.live_report import LiveReport

ON = "logger.report=true"


def test_a_training_writes_its_report_and_ends_in_the_same_bits(lab: Lab, tmp_path: Path) -> None:
    printed = lab.train(ON, "run.variant=told")
    lab.train("run.variant=silent")
    silent, told = lab.runs()
    assert_same_end(told, silent)
    page = (told / "report.html").read_text()
    assert "completed" in page
    assert "data-refresh" not in page.split("<script>")[0]
    assert 'id="sees"' in page  # the last one has all that it can have
    assert f"report       {told}/report.html" in printed
    (reported,) = events(told, "reported")
    assert reported["written"] >= 1
    assert reported["blocked_secs"] < 1.0
    assert not (silent / "report.html").exists()
    assert events(silent, "reported") == []


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_said_once_and_stops_nothing(lab: Lab) -> None:
    lab.train("train.stop_after_steps=1")
    run = lab.only_run()
    (run / "report.html").mkdir()
    printed = lab.train(ON)
    assert record(run)["state"] == "completed"
    assert printed.count("report.html could not be written") == 1
    assert f"dino-exp checkpoints report {run}" in printed.replace("\n", " ")


@pytest.mark.slow
def test_a_training_that_is_stopped_or_killed_leaves_a_page(lab: Lab) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        for run in lab.runs():
            (run / "report.html").unlink()
        attempt = lab.fork(ON, "train.epochs=40")
        _until(lambda: any((run / "report.html").exists() for run in lab.runs()))
        attempt.kill(number)
        attempt.wait()
        run = lab.only_run()
        assert (run / "report.html").read_text().endswith("</html>\n")
        time.sleep(8)  # one that was under way may still be put in its place
    lab.cli("checkpoints", "report", str(run), "--no-model")
    assert "killed or aborted" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_sweep_has_a_page_that_its_jobs_write(lab: Lab) -> None:
    lab.train("--multirun", "seed=0,1", ON, "sweep.name=pair")
    page = (lab.outputs / "sweeps" / "pair" / "report.html").read_text()
    assert page.count("<td>completed</td>") == 2
    assert "data-refresh" not in page.split("<script>")[0]


def test_one_is_written_at_a_time_and_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho x >> $0.log; sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    report = LiveReport(tmp_path)
    began = time.monotonic()
    for _ in range(20):
        report.refresh()
    report.begin_last(hurried=True)
    assert time.monotonic() - began < 5
    assert report.num_written == 2
    assert report.blocked_secs < 5
    assert report.wait(0.2) is False  # it takes too long, and is left


def _until(holds, secs: float = 60.0) -> None:
    end = time.monotonic() + secs
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)
