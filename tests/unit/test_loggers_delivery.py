"""Rows reach a tracker once each, whatever it does, and training waits for none of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dino_exp.errors import LockedError
from dino_exp.fsio import DamagedFileError
from dino_exp.loggers.delivery import Delivery, Pace, Row, numbers_of
from dino_exp.runs.following import rows_from
from dino_exp.runs.rows import RowWriter

FAST = Pace(poll_secs=0.01, first_pause_secs=0.01, longest_pause_secs=0.02)


class Shelf:
    """A tracker that keeps steps, as a server would: it outlives the thread, and fails when it is told to."""

    name, remedy = "shelf", "the next attempt brings them"

    def __init__(self, *, failures: int = 0, takes_half: bool = False) -> None:
        self.steps: list[int] = []
        self.failures, self.takes_half = failures, takes_half
        self.num_opened, self.outcome, self.abandoned = 0, "", False
        self.gate = threading.Event()
        self.gate.set()

    def open(self) -> int | None:
        self.num_opened += 1
        self.fail()
        return max(self.steps, default=None)

    def deliver(self, rows: Sequence[Row]) -> None:
        self.gate.wait(20)
        for number, row in enumerate(rows):
            if self.takes_half and number == len(rows) // 2:
                self.takes_half = False
                raise ConnectionError("cut in the middle")
            self.steps.append(row["step"])

    def close(self, secs: float, outcome: str) -> None:
        self.outcome = outcome

    def abandon(self) -> None:
        self.abandoned = True

    def fail(self) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody at home")


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[RowWriter]:
    writer = RowWriter(tmp_path / "metrics.jsonl")
    writer.open_at(0, 0)
    yield writer
    writer.close()


def fill(rows: RowWriter, steps: Sequence[int]) -> None:
    for step in steps:
        rows.append({"step": step, "loss": step / 7, "wall": {"seconds": 0.5}})


class Told(list[tuple[str, str]]):
    def __call__(self, kind: str, text: str) -> None:
        self.append((kind, text))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


def delivery(rows: RowWriter, tracker: Shelf, told: Told, guard: Any = lambda: None) -> Delivery:
    made = Delivery(tracker, partial(rows_from, rows.path), tell=told, guard=guard, pace=FAST)
    made.start()
    return made


def end(made: Delivery, secs: float = 20.0, outcome: str = "completed") -> None:
    made.ask_to_end(secs, outcome)
    made.finish()


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_rows_arrive_while_they_are_written_and_the_last_ones_at_the_end(rows: RowWriter) -> None:
    shelf, told = Shelf(), Told()
    made = delivery(rows, shelf, told)
    fill(rows, range(0, 5))
    wait_for(lambda: shelf.steps == [0, 1, 2, 3, 4])
    fill(rows, range(5, 9))
    end(made)
    assert shelf.steps == list(range(9))
    assert (shelf.outcome, told) == ("completed", [])


def test_a_tracker_that_fails_is_told_once_and_tried_again_until_it_works(rows: RowWriter) -> None:
    shelf, told = Shelf(failures=4), Told()
    fill(rows, range(6))
    made = delivery(rows, shelf, told)
    wait_for(lambda: "tracker_up" in told.kinds())
    end(made)
    assert told.kinds() == ["tracker_down", "tracker_up"]
    assert "nobody at home" in told[0][1]
    assert shelf.num_opened == 5
    assert shelf.steps == list(range(6))


def test_what_was_taken_before_an_error_is_not_sent_again(rows: RowWriter) -> None:
    shelf, told = Shelf(takes_half=True), Told()
    fill(rows, range(8))
    made = delivery(rows, shelf, told)
    wait_for(lambda: len(shelf.steps) == 8)
    end(made)
    assert shelf.steps == list(range(8))
    assert told.kinds() == ["tracker_down", "tracker_up"]


def test_a_new_attempt_goes_on_from_what_the_tracker_has_though_the_rows_were_cut(rows: RowWriter) -> None:
    shelf, told = Shelf(), Told()
    fill(rows, [0, 10, 20])
    kept = rows.position
    fill(rows, [30, 40])
    end(delivery(rows, shelf, told))
    rows.open_at(kept.num_rows, kept.num_bytes)
    made = delivery(rows, shelf, told)
    fill(rows, [30, 40, 50])
    end(made)
    assert shelf.steps == [0, 10, 20, 30, 40, 50]


def test_a_tracker_that_never_answers_holds_up_nobody_and_the_rest_is_counted(rows: RowWriter) -> None:
    shelf, told = Shelf(), Told()
    shelf.gate.clear()
    made = delivery(rows, shelf, told)
    started = time.monotonic()
    fill(rows, range(50))
    end(made, secs=0.2)
    assert time.monotonic() - started < 5
    assert shelf.abandoned
    assert told.kinds() == ["tracker_behind"]
    assert "has not got 50 of the rows" in told[0][1]
    assert shelf.remedy in told[0][1]
    shelf.gate.set()


def test_one_that_is_down_to_the_end_is_told_once_with_what_it_lacks(rows: RowWriter) -> None:
    shelf, told = Shelf(failures=10**9), Told()
    fill(rows, range(3))
    made = delivery(rows, shelf, told)
    wait_for(lambda: shelf.num_opened > 3)
    end(made)
    assert told.kinds() == ["tracker_down", "tracker_behind"]
    assert "could not be asked, and may lack up to 3 of the rows" in told[1][1]


def test_a_run_that_is_anothers_now_is_left_in_silence(rows: RowWriter) -> None:
    shelf, told = Shelf(), Told()
    lost: list[Exception] = []

    def guard() -> None:
        if lost:
            raise lost[0]

    made = delivery(rows, shelf, told, guard)
    fill(rows, range(3))
    wait_for(lambda: len(shelf.steps) == 3)
    lost.append(LockedError("another's"))
    fill(rows, range(3, 6))
    end(made)
    assert shelf.steps == [0, 1, 2]
    assert told == []


def test_pauses_grow_up_to_the_longest() -> None:
    pauses = [Pace().after_failures(number) for number in (1, 2, 3, 20, 10_000)]
    assert pauses == [5.0, 10.0, 20.0, 300.0, 300.0]


def test_numbers_of_a_row() -> None:
    row = {
        "step": 3,
        "loss": 0.5,
        "kl": "nan",
        "grad": "-inf",
        "note": "x",
        "n": 2,
        "none": None,
        "wall": {"seconds": 1.5},
    }
    found = numbers_of(row)
    assert found.pop("kl") != found.get("kl")
    assert found == {"loss": 0.5, "grad": float("-inf"), "n": 2.0, "wall/seconds": 1.5}


def test_rows_are_read_by_blocks_and_a_torn_one_is_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert rows_from(path, 0) == ([], 0)
    lines = [f'{{"step": {step}, "text": "{"x" * step}"}}\n'.encode() for step in range(40)]
    path.write_bytes(b"".join(lines) + b'{"step": 40, "te')
    seen: list[Any] = []
    position, reads = 0, 0
    while True:
        found, after = rows_from(path, position, block_bytes=16)  # shorter than any row
        if after == position:
            break
        seen, position, reads = seen + [row["step"] for row in found], after, reads + 1
    assert (seen, position) == (list(range(40)), sum(map(len, lines)))
    assert reads > 10
    path.write_bytes(b"[1]\n")
    with pytest.raises(DamagedFileError, match="found list"):
        rows_from(path, 0)
