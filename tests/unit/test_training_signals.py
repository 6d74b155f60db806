"""A signal at each place of the loop, once and twice: one clean save, or none and the last commit stands. Continued,
the run ends in the same bits and the same rows as one that was never disturbed.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from support.tiny_training import HORIZON, Kick, TinyRun

TERM, INT, USR1, USR2 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2
PLACES = {  # and at which of its calls
    "before the loop": 1,
    "waiting for data": 5,
    "augmentation": 5,
    "forward": 5,
    "backward": 5,
    "before the update": 5,
    "the update": 5,
    "between optimizer and teacher": 5,
    "the moving average": 5,
    "evaluation": 5,  # three batches of the untrained model in `begin`, three after step 3
    "before a row is written": 4,  # those of steps 0, 2, 3, 4, 6
    "after a row is written": 4,
    "a save begins": 2,
    "rows are synced": 2,
    "a pack is written": 2,
    "the commit": 2,
    "retention": 1,
    "the very end": 1,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = TinyRun(tmp_path_factory.mktemp("signals") / "reference")
    assert run.train().state == "completed"
    return run


def check_same_end(run: TinyRun, reference: TinyRun) -> None:
    outcome = run.train()
    assert (outcome.state, outcome.step, outcome.signum) == ("completed", HORIZON, None)
    assert run.newest().step == HORIZON
    assert run.newest().state_digest == reference.newest().state_digest
    assert run.rows() == reference.rows()
    assert run.reader.verify()["ok"]


def check_stop(run: TinyRun, *kicks: Kick) -> None:
    """One clean save of the step that was reached, unless the training was over already."""
    outcome = run.train(*kicks)
    assert (outcome.state, outcome.signum) in (("preempted", kicks[0].number), ("completed", None))
    assert outcome.state == "preempted" or outcome.step == HORIZON
    assert run.newest().step == outcome.step
    assert [step for step, _ in run.saved].count(outcome.step) == 1
    by_signal = [step for step, reasons in run.saved if f"signal {signal.Signals(kicks[0].number).name}" in reasons]
    assert set(by_signal) <= {outcome.step}
    assert run.reader.verify()["ok"]
    assert len(run.rows()) == run.newest().aside["metrics_rows"]


def check_abort(run: TinyRun, *kicks: Kick) -> None:
    """No save is begun, and what was committed stands."""
    with pytest.raises(KeyboardInterrupt):
        run.train(*kicks)
    assert run.reader.verify()["ok"]
    found = [row["step"] for row in run.reader.rows()]
    assert max(found, default=0) >= max((step for step, _ in run.saved), default=0)


@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("place", PLACES)
def test_a_signal_to_stop(place: str, num: int, tmp_path: Path, reference: TinyRun) -> None:
    run = TinyRun(tmp_path / "run")
    check_stop(run, *[Kick(place, PLACES[place], TERM)] * num)
    check_same_end(run, reference)


@pytest.mark.parametrize("place", PLACES)
def test_two_interrupts(place: str, tmp_path: Path, reference: TinyRun) -> None:
    run = TinyRun(tmp_path / "run")
    check_abort(run, *[Kick(place, PLACES[place], INT)] * 2)
    check_same_end(run, reference)


@pytest.mark.parametrize("second", ["a pack is written", "rows are synced", "the commit", "retention"])
def test_a_second_signal_while_the_last_save_is_written(second: str, tmp_path: Path, reference: TinyRun) -> None:
    """Saves of steps 2 and 4 come before it. A checkpoint is dropped after each but the first."""
    nth = 2 if second == "retention" else 3
    run = TinyRun(tmp_path / "stopped")
    check_stop(run, Kick("backward", 5, TERM), Kick(second, nth, TERM))
    assert run.newest().reasons == ("signal SIGTERM",)
    check_same_end(run, reference)
    run = TinyRun(tmp_path / "aborted")
    check_abort(run, Kick("backward", 5, INT), Kick(second, nth, INT))
    assert run.newest().step >= 4
    check_same_end(run, reference)


def test_signals_while_an_evaluation_is_made_up_for(tmp_path: Path, reference: TinyRun) -> None:
    """Each attempt is stopped in the evaluation that the one before it owed."""
    run = TinyRun(tmp_path / "run")
    check_stop(run, Kick("evaluation", 2, TERM))
    assert run.newest().step == 0
    for number in (USR2, TERM, INT):
        outcome = run.train(Kick("evaluation", 2, number))
        assert (outcome.state, outcome.step, outcome.signum) == ("preempted", 0, number)
        assert run.saved == [], "it is saved already, as it is"
    check_abort(run, *[Kick("evaluation", 2, INT)] * 2)
    check_abort(run, *[Kick("waiting for data", 1, INT)] * 2)
    assert (run.newest().step, run.newest().state["pending_row"]) == (0, None), "superseded by one that owes nothing"
    assert run.newest().reasons == ("signal SIGTERM", "evaluated")
    check_stop(run, Kick("evaluation", 2, USR2))
    assert run.newest().step == 3
    check_same_end(run, reference)


@pytest.mark.parametrize("place", ["waiting for data", "the update", "evaluation", "a pack is written"])
def test_usr1_saves_and_training_goes_on(place: str, tmp_path: Path, reference: TinyRun) -> None:
    run = TinyRun(tmp_path / "run")
    outcome = run.train(Kick(place, PLACES[place], USR1))
    assert (outcome.state, outcome.step) == ("completed", HORIZON)
    assert sum("signal SIGUSR1" in reasons for _, reasons in run.saved) == 1
    assert run.rows() == reference.rows()
    assert run.newest().state_digest == reference.newest().state_digest


@pytest.mark.crash
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("beside", "workers", "nths"), [(True, 0, range(1, 9)), (False, 0, range(1, 9)), (True, 2, (2, 5))]
)
def test_every_signal_at_every_place(
    beside: bool,
    workers: int,
    nths: Iterable[int],
    tmp_path: Path,
    reference: TinyRun,
    survived: Callable[[str, int], None],
) -> None:
    """At each of the first calls of each place; after some, the training is over before the signal comes."""
    num_stopped = num_aborted = 0
    for place, number, times, nth in itertools.product(PLACES, (TERM, INT, USR2, USR1), (1, 2), nths):
        run = TinyRun(tmp_path / f"{place} {number} {times} {nth}".replace(" ", "-"), beside=beside, workers=workers)
        kicks = [Kick(place, nth, number)] * times
        if (number, times) == (INT, 2) and reached(place, nth, beside=beside):
            check_abort(run, *kicks)
            num_aborted += 1
        elif number == USR1:
            assert run.train(*kicks).state == "completed"
        else:
            check_stop(run, *kicks)
            num_stopped += 1
        check_same_end(run, reference)
        shutil.rmtree(run.folder)
    survived("loops stopped by a signal at a known place", num_stopped)
    survived("loops aborted by a second signal at a known place", num_aborted)


@functools.cache
def reached(place: str, nth: int, *, beside: bool) -> bool:
    """Whether an undisturbed training comes to this place so often."""
    with tempfile.TemporaryDirectory() as folder:
        run = TinyRun(Path(folder) / "run", beside=beside)
        run.train()
        return run.calls.get(place, 0) >= nth
