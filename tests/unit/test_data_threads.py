"""Parts of a batch on several threads: all are done, errors are told, torch's numbers of threads stay what they are."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dino_exp.data import threads
from dino_exp.data.threads import FasterWay, in_one_thread, over_threads


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


class Paced:
    """Work whose clock shows what each way of doing it is said to take: milliseconds a part, by number of threads."""

    def __init__(self, in_several: list[float], in_one: list[float]) -> None:
        self.now, self.ways = 0.0, list[str]()
        self._left = {"several": iter(in_several), "one": iter(in_one)}

    def batch(self, faster: FasterWay, num_parts: int = 4) -> str:
        """The way in which a batch was worked on."""
        done: list[tuple[int, int]] = []
        faster.work(lambda part: done.append((part, threading.get_ident())), range(num_parts))
        assert sorted(part for part, _ in done) == list(range(num_parts))
        return self.ways[-1]

    def instead_of(self, name: str, original: Callable[..., None]) -> Callable[..., None]:
        def timed(work: Callable[[int], None], parts: Sequence[int]) -> None:
            original(work, parts)
            self.ways.append(name)
            self.now += len(parts) * next(self._left[name], 1.0)

        return timed


def paced(monkeypatch: pytest.MonkeyPatch, in_several: list[float], in_one: list[float]) -> tuple[Paced, FasterWay]:
    pace = Paced(in_several, in_one)
    monkeypatch.setattr(threads, "over_threads", pace.instead_of("several", over_threads))
    monkeypatch.setattr(threads, "in_one_thread", pace.instead_of("one", in_one_thread))
    torch.set_num_threads(2)
    return pace, FasterWay(clock=lambda: pace.now)


@pytest.mark.parametrize(
    ("in_several", "in_one", "faster"),
    [
        pytest.param([9, 2, 2, 9], [1, 3, 3, 3], "several", id="the first of each is not counted, nor is one slow one"),
        pytest.param([1, 4, 1, 4], [9, 9, 3, 3], "one", id="medians"),
        pytest.param([2, 2, 2, 2], [2, 2, 2, 2], "several", id="as fast"),
    ],
)
def test_the_way_that_is_faster_is_kept(
    monkeypatch: pytest.MonkeyPatch, in_several: list[float], in_one: list[float], faster: str
) -> None:
    pace, way = paced(monkeypatch, in_several, in_one)
    assert [pace.batch(way) for _ in range(8)] == ["several", "one"] * 4
    assert {pace.batch(way) for _ in range(3)} == {faster}


def test_batches_of_other_sizes_count_by_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, way = paced(monkeypatch, [2, 2, 2, 2], [1, 1, 1, 1])
    for _ in range(4):
        pace.batch(way, num_parts=2)
        pace.batch(way, num_parts=20)
    assert pace.batch(way) == "one"


def test_nothing_is_tried_where_there_is_one_thread_or_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, way = paced(monkeypatch, [], [])
    torch.set_num_threads(1)
    assert {pace.batch(way) for _ in range(20)} == {"several"}
    torch.set_num_threads(2)
    assert {pace.batch(way, num_parts=1) for _ in range(20)} == {"several"}
    assert [pace.batch(way) for _ in range(2)] == ["several", "one"]


def test_a_batch_that_fails_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, way = paced(monkeypatch, [2, 2, 2, 2], [3, 3, 3, 3])

    def fail(part: int) -> None:
        raise KeyError(f"part {part}")

    assert [pace.batch(way) for _ in range(2)] == ["several", "one"]
    with pytest.raises(KeyError):
        way.work(fail, range(4))
    assert [pace.batch(way) for _ in range(6)] == ["several", "one"] * 3
    assert pace.batch(way) == "several"


def test_one_thread_is_alone_with_all_parts_and_the_number_stays() -> None:
    torch.set_num_threads(3)
    found: list[tuple[int, int, int]] = []
    in_one_thread(lambda part: found.append((part, torch.get_num_threads(), threading.get_ident())), range(5))
    assert found == [(part, 1, threading.get_ident()) for part in range(5)]
    with pytest.raises(ZeroDivisionError):
        in_one_thread(lambda part: print(1 // part), [0])
    assert torch.get_num_threads() == 3
