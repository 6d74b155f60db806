"""Which process this is, and what processes tell each other when some of them are gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ensemble import each
from torch.distributed import HashStore

from dino_exp.attempts import together
from dino_exp.attempts.numerics import choose_device, choose_threads, differences
from dino_exp.attempts.together import compare_commands
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.dist.council import Council, LostRankError, OtherRankError, Statement
from dino_exp.dist.place import ALONE, Place, place_of, share
from dino_exp.dist.ranks import ManyRanks, is_of_a_lost_rank, joined
from dino_exp.errors import ConfigError, RefusedError
from dino_exp.processes import ProcessId

CPU = torch.device("cpu")
RANKS = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def test_a_process_by_hand_is_alone() -> None:
    assert place_of({}) == place_of({"RANK": "", "WORLD_SIZE": ""}) == ALONE
    assert ALONE.is_first


def test_torchrun_says_which_process_this_is() -> None:
    assert place_of(RANKS) == Place(rank=2, size=4, local_rank=0, local_size=2)
    assert not place_of(RANKS).is_first


@pytest.mark.parametrize("change", [{"RANK": "4"}, {"RANK": "two"}, {"LOCAL_RANK": "2"}, {"WORLD_SIZE": "-1"}])
def test_impossible_places_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="torchrun"):
        place_of({**RANKS, **change})


@given(num=st.integers(0, 200), size=st.integers(1, 20))
def test_shares_are_consecutive_and_differ_by_at_most_one(num: int, size: int) -> None:
    shares = [share(num, part, size) for part in range(size)]
    assert [at for one in shares for at in one] == list(range(num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def councils(size: int, *, timeout_secs: float = 10) -> list[Council]:
    store = HashStore()
    return [Council(store, Place(rank=rank, size=size), timeout_secs=timeout_secs) for rank in range(size)]


def test_all_hear_what_each_says() -> None:
    three = councils(3)
    told = each([lambda one=one: one.gather("names", one.place.rank * 10) for one in three])  # type: ignore[misc]
    assert told == [[0, 10, 20]] * 3


def test_who_does_not_answer_is_named() -> None:
    first, _ = councils(2, timeout_secs=0.2)
    with pytest.raises(LostRankError, match=r"rank 1 did not answer within 0.2 s \(runtime.timeout_secs\)"):
        first.take("anything", of=1)


def test_signs_of_life_are_waited_for_and_old_ones_count_for_nothing() -> None:
    first, second = councils(2, timeout_secs=1.2)
    second.give_sign()
    began = time.monotonic()
    with pytest.raises(LostRankError, match=r"did not answer within 1\.2 s"):
        first.take("anything", of=1)
    assert time.monotonic() - began < 2.2

    def work() -> None:
        while time.monotonic() < until:
            time.sleep(0.1)
            second.give_sign()
        second.post("result", 3)

    until = time.monotonic() + 2.5
    looks: list[int] = []
    told = each([lambda: first.take("result", of=1, meanwhile=lambda: looks.append(1)), work])
    assert told == [3, None]
    assert len(looks) >= 2


def test_signs_of_the_first_rank_end_with_its_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "_PULSE_SECS", 0.02)
    monkeypatch.setattr("dino_exp.dist.council._SIGN_SECS", 0.0)
    first, second = councils(2)
    ranks: Any = SimpleNamespace(connect=lambda: first.connect(first._store))
    with together.signs_until_decided(ranks):
        seen = {second._last_sign(0)}
        time.sleep(0.2)
        seen.add(second._last_sign(0))
        first.post("decision", 1)
        time.sleep(0.2)
        last = second._last_sign(0)
        time.sleep(0.2)
        assert second._last_sign(0) == last
    assert len(seen) == 2


def test_a_process_of_this_host_that_has_ended_is_noticed_long_before_the_time_out() -> None:
    first, _ = councils(2, timeout_secs=60)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    me = ProcessId.of_this()
    first._processes[1] = ProcessId(me.host, me.boot_id, process.pid, started)
    threading.Timer(0.3, process.kill).start()
    began = time.monotonic()
    with pytest.raises(LostRankError, match=f"rank 1 .process {process.pid} on .*. has ended"):
        first.take("anything", of=1)
    assert time.monotonic() - began < 10
    process.communicate()


def test_a_process_elsewhere_is_never_surely_gone() -> None:
    me = ProcessId.of_this()
    assert not me.is_surely_gone()
    assert not ProcessId("another-host", me.boot_id, 2**22 + 1, 1).is_surely_gone()
    assert ProcessId(me.host, me.boot_id, os.getpid(), 1).is_surely_gone(), "another process of the same number"


def test_whoever_waits_for_a_rank_that_failed_ends_with_its_error() -> None:
    first, second = councils(2)
    second.fail("rank 1: no such data", 3)
    with pytest.raises(OtherRankError, match="rank 1: no such data") as caught:
        first.take("anything", of=1)
    assert caught.value.exit_code == 3
    side = first.connect(first._store)
    second.post("pack", "written")
    assert side.take("pack", of=1) == "written", "what was begun beside goes on"


def statement(rank: int, *, is_cause: bool, keeps: int | None, text: str = "") -> Statement:
    return Statement(rank=rank, text=text or f"error {rank}", exit_code=rank + 1, is_cause=is_cause, keeps=keeps)


def test_ranks_that_all_have_the_same_step_may_save_it() -> None:
    three = councils(3)
    mine = [statement(rank, is_cause=rank == 1, keeps=7) for rank in range(3)]
    verdicts = each([lambda at=at: three[at].settle(mine[at], secs=5) for at in range(3)])  # type: ignore[misc]
    assert [(one.text, one.exit_code, one.cause, one.keeps) for one in verdicts] == [("rank 1: error 1", 2, 1, 7)] * 3


@pytest.mark.parametrize("steps", [(7, 8), (7, None)])
def test_ranks_at_different_steps_save_nothing(steps: tuple[int, int | None]) -> None:
    two = councils(2)
    mine = [statement(rank, is_cause=True, keeps=steps[rank]) for rank in range(2)]
    verdicts = each([lambda at=at: two[at].settle(mine[at], secs=5) for at in range(2)])  # type: ignore[misc]
    assert [one.keeps for one in verdicts] == [None, None]


def test_a_verdict_without_a_missing_rank_stands_when_that_one_comes_late() -> None:
    first, second = councils(2)
    early = first.settle(statement(0, is_cause=False, keeps=7), secs=0.1)
    assert early.text == "rank 1 ended or did not answer"
    assert early.keeps is None
    late = second.settle(statement(1, is_cause=True, keeps=7), secs=5)
    assert late == early


def test_errors_that_only_say_that_a_rank_is_missed() -> None:
    assert is_of_a_lost_rank(LostRankError("gone"))
    assert is_of_a_lost_rank(
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed")
    )
    assert not is_of_a_lost_rank(RuntimeError("shapes do not match"))
    assert not is_of_a_lost_rank(torch.cuda.OutOfMemoryError("gloo"))


class Asked:
    def __init__(self, *overrides: str) -> None:
        self.overrides = overrides
        self.config = config_from_mapping(compose(overrides))


@pytest.mark.parametrize("other", [("seed=1",), ("runtime.workers=1",)])
def test_processes_started_with_different_commands_are_refused_on_all(other: tuple[str, ...]) -> None:
    asked = [Asked(), Asked(*other)]
    ranks = [ManyRanks(council.place, council) for council in councils(2)]
    work = [lambda at=at: compare_commands(ranks[at], asked[at].config, asked[at], CPU) for at in range(2)]  # type: ignore[misc, arg-type]
    told = each(work)
    assert all(isinstance(one, RefusedError) and one.exit_code == 3 for one in told), told
    assert len({str(one) for one in told}) == 1
    assert "rank 1 was started with" in str(told[0])
    asked[1] = asked[0]
    ranks = [ManyRanks(council.place, council) for council in councils(2)]
    assert each(work) == [None, None]


def test_processes_that_found_different_devices_are_refused_on_all() -> None:
    ranks, asked = [ManyRanks(council.place, council) for council in councils(2)], Asked()
    devices = [torch.device("cuda"), CPU]
    told = each([lambda at=at: compare_commands(ranks[at], asked.config, asked, devices[at]) for at in range(2)])  # type: ignore[misc, arg-type]
    assert all(isinstance(one, RefusedError) for one in told), told
    assert "rank 1 was started with device cpu, rank 0 with cuda" in str(told[0])


@pytest.mark.parametrize(
    ("visible", "num", "local_rank", "chosen"), [("3", 1, 1, 0), ("0,1", 2, 1, 1), (None, 2, 1, 1), (None, 3, 0, 0)]
)
def test_each_process_takes_the_device_that_its_launcher_shows_it(
    visible: str | None, num: int, local_rank: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    place = Place(rank=local_rank, size=2, local_rank=local_rank, local_size=2)
    assert choose_device("auto", place) == torch.device("cuda", chosen)


@pytest.mark.parametrize("rank", [0, 1])  # the first would have a device, and would wait for the second
def test_too_few_devices_are_told_by_all(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match="has 1 CUDA devices"):
        choose_device("auto", Place(rank=rank, size=2, local_rank=rank, local_size=2))


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_place_without_a_meeting_point_is_one_message(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv(missing)
    with (
        pytest.raises(ConfigError, match=f"does not know where to meet the others: .*{missing}.* torchrun"),
        joined(Place(rank=1, size=2, local_rank=1, local_size=2), CPU, 5),
    ):
        pass


def test_who_keeps_the_store_sees_the_others_off() -> None:
    first, second, third = councils(3)
    parted: list[int] = []

    def later(council: Council) -> None:
        time.sleep(0.1 * council.place.rank)
        parted.append(council.place.rank)
        council.leave(5, keeps_store=False)

    def see_off() -> None:
        first.leave(5, keeps_store=True)
        parted.append(0)

    each([see_off, lambda: later(second), lambda: later(third)])
    assert parted == [1, 2, 0]
    alone, _ = councils(2)
    began = time.monotonic()
    alone.leave(0.3, keeps_store=True)
    assert 0.2 < time.monotonic() - began < 5


def test_processes_of_one_host_share_its_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert choose_threads(None, None, Place(rank=0, size=2, local_size=2)) == max(cores // 2, 1)
    assert choose_threads(None, None, Place(rank=0, size=64, local_size=64)) == 1
    assert choose_threads(3, None, Place(rank=0, size=2, local_size=2)) == 3


def test_another_number_of_ranks_is_told_with_what_still_holds() -> None:
    (text,) = differences({"world_size": 2}, {"world_size": 3})
    assert text == "world_size was 2, is 3 (every step still sees the same images)"
