"""How many checkpoints will be made and kept at most: against the policies themselves, step by step."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.checkpoint.policies import (
    AnyOf,
    AtEnd,
    AtMilestones,
    BestN,
    EveryEpochs,
    EveryMinutes,
    EveryNEpochs,
    EverySteps,
    KeepAny,
    LatestN,
    Milestones,
    OnImprovement,
    OnSignal,
    Pinned,
    ThinMilestones,
    milestone_from_text,
)
from dino_exp.checkpoint.policies.forecast import Kept, Span, most_kept, num_saves
from dino_exp.checkpoint.types import CheckpointInfo, SaveContext, Schedule

QUARTERS = tuple(map(milestone_from_text, ("25%", "50%", "75%", "100%")))


def span(start: int = 0, stop: int = 100, per_epoch: int = 10, every: int = 2) -> Span:
    evaluations = tuple(step for step in range(start + 1, stop + 1) if step % (every * per_epoch) == 0)
    return Span(start, stop, Schedule(stop, per_epoch), evaluations)


@pytest.mark.parametrize(
    ("policies", "expected"),
    [
        ((), 0),
        ((EveryEpochs(1),), 10),
        ((EveryEpochs(3), AtEnd()), 4),
        ((EverySteps(7), OnSignal()), 14),
        ((EveryEpochs(1), OnImprovement(), AtEnd(), AtMilestones(QUARTERS)), 12),
        ((OnImprovement(),), 5),
        ((EveryMinutes(1),), 3),  # 100 steps of two seconds
    ],
)
def test_saves_are_counted_once_a_step(policies: tuple[object, ...], expected: int) -> None:
    assert num_saves(AnyOf(policies), span(), 2.0) == expected  # type: ignore[arg-type]


def test_a_resumed_training_saves_the_rest_and_nothing_is_known_of_the_clock() -> None:
    assert num_saves(AnyOf((EveryEpochs(1), AtEnd())), span(start=65, stop=92), None) == 4
    assert num_saves(AnyOf((EveryMinutes(1),)), span(), None) == 0
    assert num_saves(AnyOf((AtEnd(),)), span(start=100), 1.0) == 0


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((LatestN(3), BestN("a"), Pinned(), Milestones(())), Kept(5)),
        ((LatestN(sys.maxsize),), Kept(10)),
        ((LatestN(1), Milestones(QUARTERS)), Kept(6)),
        ((LatestN(1), Milestones(QUARTERS), ThinMilestones(("teacher.",))), Kept(2, 4)),
        ((LatestN(1), EveryNEpochs(5)), Kept(4)),
    ],
)
def test_what_is_kept_at_most(rules: tuple[object, ...], expected: Kept) -> None:
    assert most_kept(KeepAny(rules), span(), saves=10) == expected  # type: ignore[arg-type]


@given(
    last=st.integers(1, 5), best=st.integers(0, 3), every=st.none() | st.integers(1, 4), save_every=st.integers(1, 12),
    scores=st.lists(st.floats(0, 1), min_size=60, max_size=60), thin=st.booleans(), sick_from=st.integers(0, 80),
)  # fmt: skip
def test_no_training_keeps_more(
    last: int, best: int, every: int | None, save_every: int, scores: list[float], thin: bool, sick_from: int
) -> None:
    """All of it played through, with the rules at every save."""
    ahead = span(stop=60, per_epoch=6)
    save = AnyOf((EverySteps(save_every), OnImprovement(), AtMilestones(QUARTERS), AtEnd()))
    rules = [LatestN(last), BestN("a", num=best), Milestones(QUARTERS), Pinned()]
    rules += [] if every is None else [EveryNEpochs(every)]
    rules += [ThinMilestones(("teacher.",))] if thin else []
    keep = KeepAny(tuple(rules))
    kept: list[CheckpointInfo] = []
    saves, saved, top, parts = 0, None, -1.0, set[int]()
    for step in range(1, 61):
        improved = step in ahead.evaluations and scores[step - 1] > top
        top = max(top, scores[step - 1]) if improved else top
        context = SaveContext(
            step=step, schedule=ahead.schedule, improved=improved, last_saved_step=saved, ending=step == 60
        )
        if save.should_save(context):
            saves, saved = saves + 1, step
            metrics = {"a": scores[step - 1]} if step in ahead.evaluations else {}
            kept.append(CheckpointInfo(step=step, epoch=step // 6, metrics=metrics, healthy=step < sick_from))
            plan = keep.plan(kept, ahead.schedule)
            kept, parts = [info for info in kept if info.step in plan.keep], set(plan.thin)
    expected_saves = num_saves(save, ahead, None)
    bound = most_kept(keep, ahead, expected_saves)
    assert saves <= expected_saves
    assert len(kept) <= bound.whole + bound.thin
    assert len(kept) - len(parts) <= bound.whole or not thin
