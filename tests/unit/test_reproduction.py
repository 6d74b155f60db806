"""Who made which steps of a run, with which settings; and a replay that ends with the command that began it."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cli_samples import make_run
from config_examples import config
from runs_samples import sample_attempt, sample_record
from support.checkpoints import CodedState, open_manager, request

from dino_exp.attempts.legs import attempts_of, legs_of
from dino_exp.attempts.reproduction import (
    Comparison,
    Span,
    StoppedError,
    ended_by_signals,
    refuse_empty,
    replay,
    set_settings,
)
from dino_exp.config.stored import load_stored, write_stored
from dino_exp.errors import UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import AttemptRecord, CodeRef


def attempts(*resumed_from: int | None) -> tuple[AttemptRecord, ...]:
    return tuple(
        sample_attempt(number, resumed_from=step, outcome="interrupted")
        for number, step in enumerate(resumed_from, start=1)
    )


@pytest.mark.parametrize(
    ("beginnings", "span", "made"),
    [
        ({1: 0}, (0, 9), [(1, 0, 9)]),
        ({1: 0, 2: 6}, (0, 9), [(1, 0, 6), (2, 6, 9)]),
        ({1: 0, 2: 6}, (6, 9), [(2, 6, 9)]),
        ({1: 0, 2: 6}, (2, 5), [(1, 2, 5)]),
        ({1: 0, 2: 6, 3: 6}, (0, 9), [(1, 0, 6), (3, 6, 9)]),
        ({1: 0, 2: 6, 3: 4}, (0, 9), [(1, 0, 4), (3, 4, 9)]),  # a checkpoint was damaged: step 6 was made again
        ({1: 5, 2: 7}, (5, 9), [(1, 5, 7), (2, 7, 9)]),  # a fork
        ({1: 0, 3: 0}, (0, 9), [(3, 0, 9)]),
    ],
)
def test_each_step_was_made_by_the_last_attempt_that_came_by(
    beginnings: dict[int, int], span: tuple[int, int], made: list[tuple[int, int, int]]
) -> None:
    found = attempts_of(attempts(*[None] * max(beginnings)), beginnings, Span(start=span[0], stop=span[1]))
    assert [(one.number, part.start, part.stop) for part, one in found] == made


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(make_run(tmp_path / "outputs"))
    write_stored(config(), paths.directory)
    return paths


def note_changes(paths: RunPaths, attempt: int, **changes: object) -> None:
    folder = paths.attempt_hydra_dir(attempt)
    folder.mkdir(parents=True)
    rows = [
        {"key": key.replace("__", "."), "was": None, "now": now, "verdict": "allowed"} for key, now in changes.items()
    ]
    (folder / "diff.json").write_text(json.dumps(rows))


def note_events(paths: RunPaths, *events: Mapping[str, object]) -> None:
    paths.events.write_text("".join(json.dumps(event) + "\n" for event in events))


def test_a_leg_ends_where_code_or_settings_changed(paths: RunPaths) -> None:
    other = CodeRef(id="ee" * 32, commit="1" * 40, dirty=False)
    made = attempts(None, 6, 8, 9)
    made = (*made[:3], replace(made[3], code=other))
    note_changes(paths, 2, train__stop_after_steps=8)  # says nothing of the steps
    note_changes(paths, 3, logger__every_steps=3, runtime__threads=2)
    record = sample_record(step=12, attempts=made)
    legs = legs_of(paths, record, Span(start=0, stop=12))
    assert [(leg.attempt.number, leg.span.start, leg.span.stop) for leg in legs] == [(1, 0, 8), (3, 8, 9), (4, 9, 12)]
    assert [leg.changes for leg in legs] == [{}, {"logger.every_steps": 3, "runtime.threads": 2}, {}]
    assert legs[2].attempt.code == other
    assert legs[1].describe() == "logger.every_steps=3, runtime.threads=2"


def test_an_attempt_that_was_killed_before_it_went_on_has_made_nothing(paths: RunPaths) -> None:
    began = [{"kind": "attempt_started", "attempt": number} for number in (1, 2, 3)]
    record = sample_record(step=9, attempts=attempts(None, None, 6))
    note_changes(paths, 2, logger__every_steps=3)
    note_changes(paths, 3, logger__every_steps=2)
    note_events(paths, began[0], {"kind": "saved", "step": 6}, began[1], began[2])
    legs = legs_of(paths, record, Span(start=0, stop=9))
    assert [(leg.attempt.number, leg.span.stop) for leg in legs] == [(1, 6), (3, 9)]
    note_events(paths, began[0], began[1], {"kind": "saved", "step": 6}, began[2])  # nothing was saved: it began again
    legs = legs_of(paths, record, Span(start=0, stop=9))
    assert [(leg.attempt.number, leg.span.stop) for leg in legs] == [(2, 6), (3, 9)]


def test_a_list_of_changes_is_believed_in_nothing(paths: RunPaths) -> None:
    record, span = sample_record(step=9, attempts=attempts(None, 6)), Span(start=0, stop=9)
    note_changes(paths, 2, x=1)
    (paths.attempt_hydra_dir(2) / "diff.json").write_text("{}")
    with pytest.raises(DamagedFileError, match=r"diff\.json: .*expected a list"):
        legs_of(paths, record, span)


def test_the_copy_gets_the_settings_of_the_attempt(paths: RunPaths, tmp_path: Path) -> None:
    copy = RunPaths(tmp_path / "copy" / "runs" / "x")
    copy.directory.mkdir(parents=True)
    (copy.directory / "config.canonical.json").write_bytes(paths.canonical_json.read_bytes())
    set_settings(paths, copy, {"logger.every_steps": 7, "runtime.threads": 3})
    found = load_stored(copy.directory)
    assert (found.logger.every_steps, found.runtime.threads) == (7, 3)
    set_settings(paths, copy, {})
    assert copy.config_yaml.read_bytes() == paths.config_yaml.read_bytes()
    with pytest.raises(DamagedFileError, match=r"'nothing\.there', which is no setting"):
        set_settings(paths, copy, {"nothing.there": 1})


TRAINING = """
import os, signal, sys, time
open("pid", "w").write(str(os.getpid()))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_replay_too(signum: signal.Signals, paths: RunPaths, tmp_path: Path) -> None:
    """By a program in the place of the training, which takes no time to start."""
    package = tmp_path / "code" / "dino_exp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(TRAINING)
    pid = paths.directory / "pid"

    def interrupt() -> None:
        until = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    before = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(signum, before)  # nohup, or a shell's `&`, may have had it ignored
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(StoppedError, match=signum.name) as caught, ended_by_signals():
        replay(paths, paths, 1, tmp_path / "code", keeps_copy=False)
    thread.join()
    assert caught.value.exit_code == 128 + signum
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.signal(signum, found) == before


SAYING = """
import os
print("Attempt 2: continue")
print("  go on  python -m dino_exp.train resume=" + os.getcwd())
print("step 1/1")
"""


@pytest.mark.parametrize("keeps_copy", [False, True])
def test_a_replay_names_its_folder_only_where_that_stays(
    keeps_copy: bool, paths: RunPaths, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "code" / "dino_exp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(SAYING)
    assert replay(paths, paths, 1, tmp_path / "code", keeps_copy=keeps_copy) == 0
    told = capfd.readouterr()
    assert told.out == ""
    go_on = [f"  go on  python -m dino_exp.train resume={paths.directory}"] if keeps_copy else []
    assert told.err.splitlines() == ["Attempt 2: continue", *go_on, "step 1/1"]


def note_rows(paths: RunPaths, *steps: int) -> None:
    paths.metrics.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps))


def test_a_replay_with_nothing_to_compare_is_refused_with_a_number_that_would_do(paths: RunPaths) -> None:
    record, from_start = sample_record(step=24), Span(start=0, stop=5)
    note_rows(paths, 0, 10, 20)
    with pytest.raises(UsageError, match=r"in steps 0 to 5: the first row of the run is of step 10; try --verify 10$"):
        refuse_empty(paths, record, from_start)
    refuse_empty(paths, record, Span(start=0, stop=10))
    with pytest.raises(UsageError, match=r"the first row of the run after step 10 is of step 20; try --verify 10$"):
        refuse_empty(paths, record, Span(start=10, stop=19))
    note_rows(paths, 0, 30)  # the last was written by an attempt that was killed
    with pytest.raises(UsageError, match=r"no row and no checkpoint of a step after 0$"):
        refuse_empty(paths, record, from_start)
    manager = open_manager(paths.checkpoints)
    manager.save(CodedState(7), request(7))
    manager.drain()
    with pytest.raises(UsageError, match=r"the first checkpoint of the run is of step 7; try --verify 7$"):
        refuse_empty(paths, record, from_start)
    refuse_empty(paths, record, Span(start=0, stop=7))


def test_a_comparison_of_nothing_is_none() -> None:
    assert Comparison(num_rows=0, states=(), difference=None).is_empty
    assert not Comparison(num_rows=1, states=(), difference=None).is_empty
    assert not Comparison(num_rows=0, states=(7,), difference=None).is_empty
