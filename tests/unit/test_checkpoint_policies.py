from __future__ import annotations

import math
from fractions import Fraction

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
    KeepRule,
    LatestN,
    Milestone,
    Milestones,
    OnImprovement,
    OnSignal,
    Pinned,
    SavePolicy,
    derive_kinds,
    milestone_from_text,
    milestone_steps,
    plan_retention,
    rank_best,
    retention_from_json,
    retention_to_json,
)
from dino_exp.checkpoint.types import CheckpointInfo, SaveContext, Schedule
from dino_exp.errors import ConfigError

QUARTERS = tuple(milestone_from_text(text) for text in ("25%", "50%", "75%", "100%"))
RUN = Schedule(horizon_steps=100, steps_per_epoch=10)


def context(step: int = 1, **fields: object) -> SaveContext:
    return SaveContext(step=step, schedule=RUN, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "given_context", "reasons"),
    [
        (EverySteps(5), context(10), ("every 5 steps",)),
        (EverySteps(5), context(11), ()),
        (EveryEpochs(2), context(20), ("epoch 2",)),
        (EveryEpochs(2), context(10), ()),
        (EveryEpochs(2), context(21), ()),
        (EveryMinutes(10), context(now_secs=599, last_save_secs=0), ()),
        (EveryMinutes(10), context(now_secs=600, last_save_secs=0), ("every 10 minutes",)),
        (EveryMinutes(10), context(now_secs=50, last_save_secs=100), ("every 10 minutes",)),  # clock set back
        (EveryMinutes(0.5), context(now_secs=30, last_save_secs=0), ("every 0.5 minutes",)),
        (OnImprovement(), context(improved=True), ("improved",)),
        (OnImprovement(), context(), ()),
        (AtMilestones(QUARTERS), context(25), ("milestone 25%",)),
        (AtMilestones(QUARTERS), context(26), ()),
        (AtMilestones((*QUARTERS, Milestone(epoch=5))), context(50), ("milestone 50%", "milestone epoch 5")),
        (AtEnd(), context(100), ("end",)),
        (AtEnd(), context(37, ending=True), ("end",)),
        (AtEnd(), context(99), ()),
        (OnSignal(), context(signal="SIGTERM"), ("signal SIGTERM",)),
        (OnSignal(), context(), ()),
        (AnyOf((EverySteps(5), EveryEpochs(1), AtEnd())), context(10), ("every 5 steps", "epoch 1")),
        (AnyOf((EverySteps(5), EveryEpochs(1))), context(10, last_saved_step=10), ()),
        (AnyOf(()), context(10), ()),
    ],
)
def test_when_to_save(policy: SavePolicy, given_context: SaveContext, reasons: tuple[str, ...]) -> None:
    assert policy.should_save(given_context) == reasons


@pytest.mark.parametrize("policy", [EverySteps, EveryEpochs, EveryMinutes])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_impossible_intervals_are_refused(policy: type, value: float) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.save\.every_"):
        policy(value)


def test_milestones_each_exactly_once_whatever_the_horizon() -> None:
    for horizon in range(1, 1001):
        schedule = Schedule(horizon_steps=horizon, steps_per_epoch=max(1, horizon // 10))
        steps = milestone_steps(QUARTERS, schedule)
        assert set(steps) <= set(range(1, horizon + 1))
        hits = [label for step in sorted(steps) for label in steps[step]]
        assert hits == ["25%", "50%", "75%", "100%"], horizon


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_a_fraction_is_reached_at_the_first_step_that_reaches_it(horizon: int, millionths: int) -> None:
    share = Fraction(millionths, 10**6)
    step = Milestone(fraction=share).step(Schedule(horizon, 1))
    assert Fraction(step, horizon) >= share > Fraction(step - 1, horizon)


@pytest.mark.parametrize("epochs", [10, 400])
def test_percent_milestones_in_short_and_long_runs(epochs: int) -> None:
    """The usual tolerance (`abs(percent - 25) < 1`) hits eight epochs of 400, and perhaps none of 10."""
    schedule = Schedule(horizon_steps=epochs * 33, steps_per_epoch=33)
    assert sorted(milestone_steps(QUARTERS, schedule)) == [-(-epochs * 33 * n // 4) for n in (1, 2, 3, 4)]


def test_milestones_beyond_the_horizon_never_come() -> None:
    assert milestone_steps([Milestone(epoch=11)], RUN) == {}
    assert milestone_steps([Milestone(epoch=10)], RUN) == {100: ("epoch 10",)}


@pytest.mark.parametrize("text", ["0%", "101%", "-5", "0", "25 percent", "1e2%", "", "%", "1/4", "nan%"])
def test_texts_that_are_no_milestone(text: str) -> None:
    with pytest.raises(ConfigError):
        milestone_from_text(text)


@pytest.mark.parametrize(("text", "label"), [("25%", "25%"), ("12.5 %", "12.5%"), ("10", "epoch 10"), (7, "epoch 7")])
def test_milestone_texts_go_both_ways(text: str | int, label: str) -> None:
    milestone = milestone_from_text(text)
    assert milestone.label == label
    assert milestone_from_text(milestone.text) == milestone


def info(step: int, knn: float | None = None, **fields: object) -> CheckpointInfo:
    metrics = {} if knn is None else {"knn_top1": knn}
    return CheckpointInfo(step=step, epoch=step // 10, metrics=metrics, **fields)  # type: ignore[arg-type]


BEST = BestN("knn_top1")


@pytest.mark.parametrize(
    ("infos", "rules", "kept"),
    [
        ([], (LatestN(3),), ()),
        ([info(1)], (), (1,)),  # the floor
        ([info(1), info(2), info(3)], (LatestN(1),), (3,)),
        ([info(3), info(1), info(2)], (LatestN(2),), (2, 3)),
        ([info(1, 0.9), info(2, 0.5), info(3, 0.1)], (LatestN(1), BEST), (1, 3)),
        ([info(1, 0.9), info(2, 0.9), info(3, 0.1)], (BEST,), (1, 3)),  # of equals the earlier
        ([info(1, 0.9), info(2, 0.5), info(3, 0.1)], (BestN("knn_top1", "min"),), (3,)),
        ([info(1, 0.9), info(2, math.nan), info(3, 0.1)], (BEST,), (1, 3)),
        ([info(1, 0.2), info(2, math.inf), info(3)], (BEST,), (1, 3)),
        ([info(1, 0.2), info(2, 0.9, healthy=False), info(3, healthy=False)], (BEST,), (1, 3)),
        ([info(1), info(2), info(3, healthy=False)], (LatestN(1),), (2, 3)),  # the last healthy one
        ([info(1), info(2), info(3, verified=False)], (LatestN(1),), (2, 3)),  # something verified stays
        ([info(1), info(2), info(3, resumable=False)], (), (2, 3)),
        ([info(1, verified=False), info(2, verified=False)], (), (1, 2)),  # nothing verified: nothing goes
        ([info(25), info(26), info(100)], (Milestones(QUARTERS),), (25, 100)),
        ([info(7, reasons=("milestone 10%",)), info(8), info(9)], (Milestones(),), (7, 9)),
        ([info(1, pinned=True), info(2), info(3)], (Pinned(),), (1, 3)),
        ([info(10), info(20), info(30), info(35)], (EveryNEpochs(2),), (20, 35)),
    ],
)
def test_what_to_keep(infos: list[CheckpointInfo], rules: tuple[KeepRule, ...], kept: tuple[int, ...]) -> None:
    plan = plan_retention(infos, rules, RUN)
    assert plan.keep == kept
    assert sorted(plan.keep + plan.drop) == sorted(info.step for info in infos)
    assert all(plan.reasons[step].startswith("keep: ") for step in plan.keep)
    assert all(plan.reasons[step].startswith("drop: ") for step in plan.drop)


@pytest.mark.parametrize("make", [lambda: LatestN(-1), lambda: BestN("a", "up"), lambda: BestN("a", "max", -1)])
def test_impossible_rules_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.keep\."):
        make()  # type: ignore[operator]


checkpoint_infos = st.lists(
    st.builds(
        CheckpointInfo,
        step=st.integers(1, 100),
        epoch=st.just(0),
        metrics=st.one_of(st.just({}), st.builds(lambda x: {"knn_top1": x}, st.floats())),
        reasons=st.sampled_from([(), ("milestone 25%",), ("end",)]),
        healthy=st.booleans(),
        resumable=st.booleans(),
        verified=st.booleans(),
        pinned=st.booleans(),
    ),
    unique_by=lambda one: one.step,
    max_size=25,
)
keep_rules = st.one_of(
    st.builds(LatestN, st.integers(0, 5)),
    st.builds(BestN, st.just("knn_top1"), st.sampled_from(["max", "min"]), st.integers(0, 3)),
    st.sampled_from([Milestones(QUARTERS), Milestones(), Pinned(), EveryNEpochs(1), EveryNEpochs(3)]),
)


@given(checkpoint_infos, st.lists(keep_rules, max_size=4))
def test_keeping_twice_keeps_the_same(infos: list[CheckpointInfo], rules: list[KeepRule]) -> None:
    kept = set(plan_retention(infos, rules, RUN).keep)
    assert set(plan_retention([one for one in infos if one.step in kept], rules, RUN).keep) == kept


@given(checkpoint_infos, st.lists(keep_rules, max_size=4), keep_rules)
def test_another_rule_never_drops_more(infos: list[CheckpointInfo], rules: list[KeepRule], another: KeepRule) -> None:
    assert {*plan_retention(infos, [*rules, another], RUN).drop} <= {*plan_retention(infos, rules, RUN).drop}


@given(checkpoint_infos, st.lists(keep_rules, max_size=4))
def test_latest_best_and_something_to_go_on_from_always_stay(
    infos: list[CheckpointInfo], rules: list[KeepRule]
) -> None:
    kept = set(plan_retention(infos, [*rules, BEST], RUN).keep)
    assert not infos or max(one.step for one in infos) in kept
    assert {one.step for one in BEST.rank(infos)[:1]} <= kept
    good = {one.step for one in infos if one.verified and one.resumable}
    assert not good or good & kept
    assert {one.step for one in infos if "milestone 25%" in one.reasons} <= set(
        plan_retention(infos, [*rules, Milestones()], RUN).keep
    )


@given(st.lists(keep_rules, max_size=5))
def test_policies_go_through_json(rules: list[KeepRule]) -> None:
    policy = KeepAny(tuple(rules))
    assert retention_from_json(retention_to_json(policy)) == policy


@pytest.mark.parametrize(
    "given_json",
    [
        None,
        {},
        [1],
        ["latest"],
        [{}],
        [{"rule": "os.system"}],
        [{"rule": []}],
        [{"rule": "latest", "num": True}],
        [{"rule": "latest", "num": -1}],
        [{"rule": "best", "metric": "a" * 1000, "mode": "max", "num": 1}],
        [{"rule": "milestones", "at": ["150%"]}],
        [{"rule": "milestones", "at": 3}],
        [{"rule": "pinned"}] * 101,
    ],
)
def test_other_json_is_no_policy(given_json: object) -> None:
    with pytest.raises(ConfigError):
        retention_from_json(given_json)


def test_kinds_and_best_are_derived() -> None:
    infos = [
        info(25, 0.5, reasons=("milestone 25%",)),
        info(30, 0.9, reasons=("signal SIGTERM",)),
        info(40, 0.8, pinned=True),
        info(50, 0.95, healthy=False),
    ]
    policy = KeepAny((LatestN(3), BEST, Milestones(QUARTERS)))
    assert derive_kinds(policy, infos, RUN) == {
        25: ("milestone",),
        30: ("best", "emergency"),
        40: ("pinned",),
        50: ("latest", "milestone"),
    }
    assert [one.step for one in rank_best(policy, infos)] == [30, 40, 25]
    assert derive_kinds(KeepAny(()), [], RUN) == {}
    assert rank_best(KeepAny(()), infos) == []
