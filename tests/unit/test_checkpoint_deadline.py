"""A save before the end of an allocation, and which saves may be skipped while another is in flight."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dino_exp.checkpoint.policies import AnyOf, BeforeDeadline, EverySteps, SavePolicy, may_skip
from dino_exp.checkpoint.policies.save import DEADLINE, EMERGENCY, END, IMPROVED, INTERVAL, MILESTONE, SIGNAL
from dino_exp.checkpoint.types import SaveContext, Schedule
from dino_exp.errors import ConfigError

RUN = Schedule(horizon_steps=10**6, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("left", "now", "last_save", "last_saved_step", "reasons"),
    [
        (None, 1000, 0, 3, ()),  # nobody knows the end
        (121, 1000, 0, 3, ()),
        (120, 1000, 0, 3, ("deadline in 120 s",)),
        (117.6, 1000, 0, 3, ("deadline in 118 s",)),
        (100, 1000, 979, 3, ("deadline in 100 s",)),  # the last save lies a second before the window
        (100, 1000, 980, 3, ()),  # at its first moment
        (100, 1000, 999, 3, ()),
        (0, 1000, 879, 3, ("deadline in 0 s",)),
        (-30, 1000, 0, 3, ("deadline in 0 s",)),  # a step that was longer than the window
        (-30, 1000, 900, 3, ()),
        (100, 1000, 999, None, ("deadline in 100 s",)),  # a new run that begins within the window
        (100, 1000, 2000, 3, ("deadline in 100 s",)),  # the clock was set back: nobody knows when the save was
        (math.inf, 1000, 0, None, ()),
    ],
)
def test_when_the_end_is_near(
    left: float | None, now: float, last_save: float, last_saved_step: int | None, reasons: tuple[str, ...]
) -> None:
    context = SaveContext(
        step=7, schedule=RUN, now_secs=now, last_save_secs=last_save, last_saved_step=last_saved_step, secs_left=left
    )
    assert BeforeDeadline(120).should_save(context) == reasons


@pytest.mark.parametrize("secs", [0, -1, math.nan])
def test_an_impossible_window_is_refused(secs: float) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.save\.before_secs must be over 0"):
        BeforeDeadline(secs)


def saves(
    policy: SavePolicy, *, start: int, step_secs: list[int], save_secs: int, end: int, first_save: int | None
) -> list[tuple[int, tuple[str, ...]]]:
    """The times of the saves and their reasons, of a training that starts at `start` on a machine lent until `end`."""
    now, last_save, last_saved_step, found = start, start, first_save, []
    for step, secs in enumerate(step_secs, start=1):
        now += secs
        reasons = policy.should_save(
            SaveContext(
                step=step,
                schedule=RUN,
                now_secs=now,
                last_save_secs=last_save,
                last_saved_step=last_saved_step,
                secs_left=end - now,
            )
        )
        if reasons:
            found.append((now, reasons))
            now += save_secs
            last_save, last_saved_step = now, step
    return found


step_times = st.lists(st.integers(1, 60), min_size=1, max_size=60)


@given(step_times, st.integers(0, 30), st.integers(1, 600), st.integers(1, 600), st.sampled_from([None, 0]))
def test_exactly_one_save_before_the_end(
    step_secs: list[int], save_secs: int, before: int, window_opens: int, first_save: int | None
) -> None:
    """Whatever the steps take, even if one of them is longer than the whole window."""
    assume(window_opens <= sum(step_secs))
    end = window_opens + before
    found = saves(
        BeforeDeadline(before), start=0, step_secs=step_secs, save_secs=save_secs, end=end, first_save=first_save
    )
    times = [sum(step_secs[:num]) for num in range(1, len(step_secs) + 1)]
    assert [when for when, _ in found] == [next(time for time in times if time >= window_opens)]
    assert all(reasons[0].startswith(DEADLINE) for _, reasons in found)


@given(step_times, st.integers(1, 30), st.integers(1, 200), st.integers(1, 200), st.integers(1, 20))
def test_a_save_of_another_reason_within_the_window_serves_as_well(
    step_secs: list[int], save_secs: int, before: int, window_opens: int, every: int
) -> None:
    policy = AnyOf((EverySteps(every), BeforeDeadline(before)))
    found = saves(policy, start=0, step_secs=step_secs, save_secs=save_secs, end=window_opens + before, first_save=None)
    late = [reasons for when, reasons in found if when >= window_opens]
    for_the_end = [reasons for reasons in late if any(reason.startswith(DEADLINE) for reason in reasons)]
    assert len(for_the_end) <= 1
    assert for_the_end == late[: len(for_the_end)]  # if at all, then the first one
    last_save = found[-1][0] + save_secs if found else 0
    assert last_save >= window_opens or sum(step_secs) + save_secs * len(found) < window_opens


@given(step_times, st.integers(1, 600))
def test_a_new_run_within_the_window_saves_its_first_step_and_a_resumed_one_nothing(
    step_secs: list[int], before: int
) -> None:
    policy = BeforeDeadline(before)
    new = saves(policy, start=0, step_secs=step_secs, save_secs=1, end=before - 1, first_save=None)
    assert [when for when, _ in new] == step_secs[:1]
    assert saves(policy, start=0, step_secs=step_secs, save_secs=1, end=before - 1, first_save=5) == []


@given(step_times, st.integers(1, 600), st.integers(600, 10**9))
def test_an_end_that_was_over_long_before_asks_for_nothing_of_a_resumed_run(
    step_secs: list[int], before: int, ago: int
) -> None:
    policy = BeforeDeadline(before)
    assert saves(policy, start=0, step_secs=step_secs, save_secs=1, end=-ago, first_save=5) == []


STEPS, MINUTES = f"{INTERVAL}5 steps", f"{INTERVAL}10 minutes"


@pytest.mark.parametrize(
    ("reasons", "skipped"),
    [
        ((STEPS,), True),
        ((MINUTES,), True),
        ((STEPS, MINUTES), True),
        ((), False),
        (("epoch 3",), False),
        ((MILESTONE + "25%",), False),
        ((IMPROVED,), False),
        ((END,), False),
        ((SIGNAL + "SIGTERM",), False),
        ((DEADLINE + "in 118 s",), False),
        ((EMERGENCY,), False),
        (("fork",), False),
        (("evaluated",), False),
        (("asked for by hand",), False),
        ((STEPS, "epoch 3"), False),
        ((MILESTONE + "25%", MINUTES), False),
        (("not every 5 steps",), False),
    ],
)
def test_which_saves_may_be_skipped(reasons: tuple[str, ...], skipped: bool) -> None:
    assert may_skip(reasons) is skipped
