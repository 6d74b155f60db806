"""Parts of a batch on several threads: all are done, errors are told, torch's numbers of threads stay what they are."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dino_exp.data import threads
from dino_exp.data.threads import over_threads


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_part_is_done_once_by_a_thread_that_uses_one(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    found: list[tuple[int, int]] = []
    over_threads(lambda part: found.append((part, torch.get_num_threads())), range(20))
    assert sorted(found) == [(part, 1) for part in range(20)]
    assert torch.get_num_threads() == num_threads


def test_two_parts_are_worked_on_at_once() -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=30)
    over_threads(lambda _: both.wait(), range(2))


def test_small_parts_are_worked_on_beside_large_ones() -> None:
    torch.set_num_threads(2)
    both, beside = threading.Barrier(2, timeout=30), list[int]()

    def work(part: int) -> None:
        both.wait()
        beside.append(part)
        both.wait()

    over_threads(work, range(6))
    assert [sum(beside[start : start + 2]) for start in (0, 2, 4)] == [5, 5, 5]


def test_no_more_threads_than_parts_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    class Noted(ThreadPoolExecutor):
        def __init__(self, num_threads: int, **others: Any) -> None:
            started.append(num_threads)
            super().__init__(num_threads, **others)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Noted)
    torch.set_num_threads(8)
    for num_parts in (1, 3, 20):
        over_threads(lambda _: None, range(num_parts))
    assert started == [2, 7]  # beside the one that asks


def test_threads_that_begin_later_have_the_usual_number() -> None:
    torch.set_num_threads(3)
    over_threads(lambda _: None, range(4))
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [3]


def test_what_a_part_raises_is_raised_and_the_number_stays() -> None:
    def fail(part: int) -> None:
        if part == 1:
            raise KeyError(f"part {part}")

    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        with pytest.raises(KeyError, match="part 1"):
            over_threads(fail, range(4))
        assert torch.get_num_threads() == num_threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]
