"""A child that hears what its parent is told, and what its end means."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_exp.processes import ChildEnd, run_child

PARENT = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "ignores" else signal.SIG_DFL)  # whatever nohup did
from dino_exp.processes import run_child
end = run_child(["sh", "-c", "echo $$ > child.new; mv child.new child; exec sleep " + sys.argv[1]])
print(end.returned, *end.signals)
sys.exit(end.code)
"""


@pytest.mark.parametrize(
    ("returned", "signals", "code"),
    [
        (0, (), 0), (3, (), 3),
        (143, (), 143), (-15, (), 143), (-1, (), 129), (-2, (), 130), (140, (), 140), (141, (), 141),
        (-9, (), 1), (-11, (), 1), (-6, (), 1), (137, (), 1), (-10, (), 1),
        (-9, (15,), 143), (0, (2,), 130), (1, (10, 12), 140), (0, (10,), 0),
    ],
)  # fmt: skip
def test_only_a_signal_that_is_meant_for_all_stops_all(returned: int, signals: tuple[int, ...], code: int) -> None:
    assert ChildEnd(returned, signals).code == code


def test_a_child_that_is_killed_has_failed() -> None:
    end = run_child(["sh", "-c", "kill -9 $$"])
    assert (end, end.stopped_by, end.code) == (ChildEnd(-9), None, 1)
    assert run_child(["sh", "-c", "exit 4"]).code == 4


@pytest.mark.parametrize(
    ("number", "secs", "mode", "says"),
    [
        (signal.SIGTERM, "60", "plain", "-15 15"),
        (signal.SIGHUP, "60", "plain", "-1 1"),
        (signal.SIGHUP, "0.5", "ignores", "0"),
    ],
)
def test_a_child_hears_what_its_parent_is_told(number: int, secs: str, mode: str, says: str, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, secs, mode],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = tmp_path / "child"
    until = time.monotonic() + 60
    while not child.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert os.getpgid(int(child.read_text())) == int(child.read_text())  # a terminal's Ctrl-C does not reach it twice
    parent.send_signal(number)
    printed, _ = parent.communicate(timeout=60)
    assert printed == f"{says}\n"
    assert parent.returncode == (0 if says == "0" else 128 + number)
