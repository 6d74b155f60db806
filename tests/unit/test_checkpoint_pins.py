"""Pinning while others pin, and while a training saves and drops."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import KEEP, ToyState, no_space, open_manager, request, save_steps

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.pins import MAX_NOTE_CHARS, load_pins, pin, save_pins, unpin
from dino_exp.checkpoint.policies import KeepAny, LatestN, Pinned
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import RetentionPlan
from dino_exp.errors import CheckpointError, CorruptCheckpointError, LockedError, NoCheckpointError, UsageError
from dino_exp.fsio import Files

LAST = KeepAny((LatestN(1), Pinned()))


class Meddling(Files):
    """Real files; `meddle` is called once, just after the first rename onto a name."""

    def __init__(self, name: str, meddle: Callable[[], Any]) -> None:
        self.name, self.meddle = name, meddle

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        if target.name == self.name:
            self.name = ""
            self.meddle()


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in CheckpointReader(folder).rows()]


def test_a_pin_is_kept_noted_and_taken_away(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2], keep=KeepAny((LatestN(9),)))
    assert pin(tmp_path, 1, "for the paper") is None
    assert pin(tmp_path, 1, "for the talk") == "for the paper"
    assert pin(tmp_path, 1) == "for the talk"
    assert pin(tmp_path, 2) is None
    assert load_pins(tmp_path) == {1: "for the talk", 2: ""}
    assert unpin(tmp_path, 1) == "for the talk"
    assert load_pins(tmp_path) == {2: ""}
    with pytest.raises(UsageError, match="step 1 is not pinned; pinned here: 2"):
        unpin(tmp_path, 1)


def test_nothing_is_made_for_what_is_not_there(tmp_path: Path) -> None:
    for act in (lambda: pin(tmp_path, 7, "x"), lambda: pin(tmp_path / "nowhere", 7, "x")):
        with pytest.raises(NoCheckpointError, match=r"step-000000007\.json: there is no such"):
            act()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="pinned here: none"):
            unpin(folder, 7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("note", ["x" * (MAX_NOTE_CHARS + 1), "two\nlines", "\x1b[31mred", "\udcff"])
def test_a_note_is_one_line_of_text(note: str, tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    with pytest.raises(UsageError, match="one line of printable text"):
        pin(tmp_path, 1, note)
    assert load_pins(tmp_path) == {}


def test_pins_that_could_not_be_read_back_are_not_written(tmp_path: Path) -> None:
    save_pins(tmp_path, {1: "x"})
    with pytest.raises(CheckpointError, match="expected at most"):
        save_pins(tmp_path, dict.fromkeys(range(2000), "x" * MAX_NOTE_CHARS))
    assert load_pins(tmp_path) == {1: "x"}


def test_many_who_pin_at_once_lose_no_pin(tmp_path: Path) -> None:
    numbers = range(1, 13)
    save_steps(tmp_path, numbers, keep=KeepAny((LatestN(99),)))
    threads = [threading.Thread(target=pin, args=(tmp_path, step, f"by {step}")) for step in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load_pins(tmp_path) == {step: f"by {step}" for step in numbers}


def test_who_holds_the_pins_for_long_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    slept: list[float] = []
    with (tmp_path / "pins.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for change in (lambda **given: pin(tmp_path, 1, "x", **given), lambda **given: unpin(tmp_path, 1, **given)):
            with pytest.raises(LockedError, match="another process has been changing the pins"):
                change(wait_secs=1.0, sleep=slept.append)
    assert sum(slept) == pytest.approx(2.0)
    assert load_pins(tmp_path) == {}


def test_the_next_retention_of_a_manager_honours_a_pin(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, keep=LAST, background=True)
    for step in range(1, 5):
        manager.save(ToyState(step), request(step))
        manager.drain()
        if step == 2:
            pin(tmp_path, 2, "keep this one")
    assert steps(tmp_path) == [2, 4]
    unpin(tmp_path, 2)
    manager.save(ToyState(5), request(5))
    manager.drain()
    assert steps(tmp_path) == [5]


def test_a_pin_after_the_plan_is_honoured_too(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=KeepAny((LatestN(9),)))
    ledger = Ledger(tmp_path, keep=LAST)
    plan = ledger.plan(request(1).schedule)
    assert plan.drop == (1, 2)
    pin(tmp_path, 1, "just in time")
    assert ledger.apply(plan) == [2]
    assert steps(tmp_path) == [1, 3]
    assert CheckpointReader(tmp_path).verify()["ok"]
    assert list(ledger.rows) == [1, 3]


def test_a_pin_that_is_written_while_the_manifest_is_hidden_is_honoured(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2], keep=KeepAny((LatestN(9),)))
    files = Meddling(".trash-step-000000001.json", lambda: save_pins(tmp_path, {1: "in between"}))
    ledger = Ledger(tmp_path, keep=LAST, files=files)
    assert ledger.apply(ledger.plan(request(1).schedule)) == []
    assert steps(tmp_path) == [1, 2]


class Died(BaseException):
    """The process is gone: nothing after this point is done."""


def die() -> None:
    raise Died


def leave_hidden(folder: Path, pins: dict[int, str]) -> None:
    """What a writer leaves that is killed between hiding step 1 and looking whether it is pinned."""
    save_steps(folder, [1, 2], keep=KeepAny((LatestN(9),)))
    ledger = Ledger(folder, keep=LAST, files=Meddling(".trash-step-000000001.json", die))
    plan = ledger.plan(request(1).schedule)
    save_pins(folder, pins)
    with pytest.raises(Died):
        ledger.apply(plan)
    assert steps(folder) == [2]


def test_a_pinned_checkpoint_that_a_dead_writer_had_hidden_comes_back(tmp_path: Path) -> None:
    leave_hidden(tmp_path, {1: "for the paper"})
    Ledger(tmp_path, keep=LAST)
    assert steps(tmp_path) == [1, 2]
    assert CheckpointReader(tmp_path).verify()["ok"]


def test_what_is_hidden_and_not_pinned_goes(tmp_path: Path) -> None:
    leave_hidden(tmp_path, {2: "another"})
    Ledger(tmp_path, keep=LAST)
    assert steps(tmp_path) == [2]
    assert not list(tmp_path.rglob("*step-000000001*"))


def test_with_pins_that_cannot_be_read_all_that_is_hidden_comes_back(tmp_path: Path) -> None:
    leave_hidden(tmp_path, {1: "for the paper"})
    (tmp_path / "pins.json").write_text("{")
    Ledger(tmp_path, keep=LAST)
    assert CheckpointReader(tmp_path).steps() == [1, 2]


@pytest.mark.parametrize("gone", ["packs", "manifest", "superseded"])
def test_what_was_already_being_erased_stays_gone(gone: str, tmp_path: Path) -> None:
    leave_hidden(tmp_path, {1: "too late"})
    hidden = tmp_path / ".trash-step-000000001.json"
    if gone == "packs":
        for pack in (tmp_path / "packs").glob("step-000000001.*"):
            pack.unlink()
    elif gone == "manifest":
        hidden.write_bytes(hidden.read_bytes()[:-1])
    else:
        (tmp_path / "step-000000001.json").write_bytes(hidden.read_bytes())
    ledger = Ledger(tmp_path, keep=LAST)
    assert steps(tmp_path) == ([1, 2] if gone == "superseded" else [2])
    assert ledger.damaged == {}
    assert not hidden.exists()


def test_a_pin_of_what_is_dropped_meanwhile_is_taken_back_aloud(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=KeepAny((LatestN(9),)))
    pin(tmp_path, 2, "another's")
    files = Meddling("pins.json", lambda: (tmp_path / "step-000000001.json").unlink())
    with pytest.raises(NoCheckpointError, match="dropped just now"):
        pin(tmp_path, 1, "too late", files=files, sleep=lambda _: None)
    assert load_pins(tmp_path) == {2: "another's"}


def test_a_manifest_that_is_hidden_for_a_moment_is_no_drop(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2], keep=KeepAny((LatestN(9),)))
    manifest, hidden = tmp_path / "step-000000001.json", tmp_path / ".trash-step-000000001.json"
    files = Meddling("pins.json", lambda: manifest.rename(hidden))
    pin(tmp_path, 1, "x", files=files, sleep=lambda _: hidden.exists() and hidden.rename(manifest) and None)
    assert load_pins(tmp_path) == {1: "x"}


def test_pins_that_become_unreadable_while_dropping_stop_it(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=KeepAny((LatestN(9),)))
    ledger = Ledger(tmp_path, keep=LAST)
    plan = RetentionPlan(keep=(3,), drop=(1, 2), reasons={1: "x", 2: "x"})
    (tmp_path / "pins.json").write_text("{")
    with pytest.raises(CorruptCheckpointError):
        ledger.apply(plan)
    (tmp_path / "pins.json").unlink()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_start_that_sweeps_the_temporary_file_costs_a_second_try(tmp_path: Path) -> None:
    class Swept(Files):
        num_left = 1

        def replace(self, source: Path, target: Path) -> None:
            if self.num_left:
                self.num_left -= 1
                source.unlink()
            super().replace(source, target)

    save_steps(tmp_path, [1])
    pin(tmp_path, 1, "x", files=Swept())
    assert load_pins(tmp_path) == {1: "x"}


def test_a_full_disk_leaves_the_old_pins(tmp_path: Path) -> None:
    class Full(Files):
        def replace(self, source: Path, target: Path) -> None:
            raise no_space()

    save_steps(tmp_path, [1, 2], keep=KEEP)
    pin(tmp_path, 1, "x")
    with pytest.raises(OSError, match="No space"):
        pin(tmp_path, 2, "y", files=Full())
    assert load_pins(tmp_path) == {1: "x"}
    assert not (tmp_path / ".pins.json.tmp").exists()
