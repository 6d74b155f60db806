"""What every save policy and every keep rule must do, whatever the run."""

from __future__ import annotations

import copy
import inspect
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_exp.checkpoint.policies import (
    AnyOf,
    AtEnd,
    AtMilestones,
    BeforeDeadline,
    BestN,
    EveryEpochs,
    EveryMinutes,
    EveryNEpochs,
    EverySteps,
    KeepAny,
    KeepRule,
    LatestN,
    Milestones,
    OnImprovement,
    OnSignal,
    Pinned,
    SavePolicy,
    ThinMilestones,
    keep,
    may_skip,
    milestone_from_text,
    plan_retention,
    retention_from_json,
    retention_to_json,
    save,
)
from dino_exp.checkpoint.types import CheckpointInfo, SaveContext, Schedule

MILESTONES = tuple(milestone_from_text(text) for text in ("25%", "12.5%", "100%", "2"))
SAVE_POLICIES: list[SavePolicy] = [
    EverySteps(3),
    EveryEpochs(2),
    EveryMinutes(0.5),
    OnImprovement(),
    AtMilestones(MILESTONES),
    AtEnd(),
    OnSignal(),
    BeforeDeadline(120),
    AnyOf((EverySteps(2), AtEnd())),
    AnyOf(()),
]
KEEP_RULES: list[KeepRule] = [
    LatestN(0),
    LatestN(2),
    BestN("knn_top1"),
    BestN("val_loss", "min", 3),
    BestN("val_loss", "min", 0),
    Milestones(MILESTONES),
    Milestones(),
    Pinned(),
    EveryNEpochs(2),
    ThinMilestones(("teacher.",)),
]
MAX_REASON = 200  # characters: it stands in one line of a table, and in each manifest


def name_of(policy: object) -> str:
    return str(policy)[:60]


every_save_policy = pytest.mark.parametrize("policy", SAVE_POLICIES, ids=name_of)
few = settings(max_examples=30)  # ten rules: enough in all
every_keep_rule = pytest.mark.parametrize("rule", KEEP_RULES, ids=name_of)

schedules = st.builds(Schedule, st.integers(1, 300), st.integers(1, 40))
seconds = st.floats(-1e12, 1e12)
contexts = st.builds(
    SaveContext,
    step=st.integers(1, 300),
    schedule=schedules,
    now_secs=seconds,
    last_save_secs=seconds,
    last_saved_step=st.none() | st.integers(0, 300),
    improved=st.booleans(),
    ending=st.booleans(),
    signal=st.sampled_from([None, "SIGTERM", "SIGUSR1"]),
    secs_left=st.none() | st.floats(allow_nan=False),
)
checkpoints = st.lists(
    st.builds(
        CheckpointInfo,
        step=st.integers(1, 300),
        epoch=st.integers(0, 30),
        metrics=st.dictionaries(st.sampled_from(["knn_top1", "val_loss", "loss"]), st.floats()),
        reasons=st.sampled_from([(), ("milestone 25%",), ("milestone 25%", "end"), ("deadline in 3 s",)]),
        healthy=st.booleans(),
        resumable=st.booleans(),
        verified=st.booleans(),
        pinned=st.booleans(),
    ),
    unique_by=lambda one: one.step,
    max_size=15,
)


def classes_of(module: object) -> set[type]:
    """The classes that a module defines itself, without its protocols."""
    found = {made for _, made in inspect.getmembers(module, inspect.isclass)}
    return {made for made in found if made.__module__ == module.__name__ and not getattr(made, "_is_protocol", False)}


def test_the_suite_covers_every_policy_and_rule() -> None:
    assert {type(policy) for policy in SAVE_POLICIES} == {
        made for made in classes_of(save) if hasattr(made, "should_save")
    }
    assert {type(rule) for rule in KEEP_RULES} == {made for made in classes_of(keep) if hasattr(made, "judge")}


@every_save_policy
@given(context=contexts)
def test_a_save_policy_is_pure(policy: SavePolicy, context: SaveContext) -> None:
    before, itself = copy.deepcopy(context), copy.deepcopy(policy)
    reasons = policy.should_save(context)
    assert policy.should_save(context) == reasons
    assert (context, policy) == (before, itself)


@every_save_policy
@given(context=contexts)
def test_reasons_to_save_are_short_texts(policy: SavePolicy, context: SaveContext) -> None:
    reasons = policy.should_save(context)
    assert isinstance(reasons, tuple)
    assert all(isinstance(text, str) and 0 < len(text) <= MAX_REASON and text.isprintable() for text in reasons)
    assert len(set(reasons)) == len(reasons)


@every_save_policy
@given(context=contexts)
def test_only_intervals_of_steps_and_minutes_may_be_skipped(policy: SavePolicy, context: SaveContext) -> None:
    reasons = policy.should_save(context)
    if not isinstance(policy, AnyOf):
        assert may_skip(reasons) == (bool(reasons) and isinstance(policy, EverySteps | EveryMinutes))


@every_keep_rule
@few
@given(infos=checkpoints, schedule=schedules)
def test_a_keep_rule_is_pure(rule: KeepRule, infos: list[CheckpointInfo], schedule: Schedule) -> None:
    infos.sort(key=lambda info: info.step)
    before = repr((infos, schedule, rule))  # NaN is not equal to itself
    verdict = rule.judge(infos, schedule)
    assert rule.judge(infos, schedule) == verdict
    assert repr((infos, schedule, rule)) == before


@every_keep_rule
@few
@given(infos=checkpoints, schedule=schedules)
def test_a_keep_rule_speaks_of_what_there_is(rule: KeepRule, infos: list[CheckpointInfo], schedule: Schedule) -> None:
    infos.sort(key=lambda info: info.step)
    verdict = rule.judge(infos, schedule)
    assert {*verdict.keep, *verdict.otherwise} <= {info.step for info in infos}
    texts = [*verdict.keep.values(), *verdict.otherwise.values()]
    assert all(isinstance(text, str) and 0 < len(text) <= MAX_REASON and text.isprintable() for text in texts)


@every_keep_rule
@few
@given(infos=checkpoints, schedule=schedules, shuffle=st.randoms())
def test_the_order_of_checkpoints_does_not_matter(
    rule: KeepRule, infos: list[CheckpointInfo], schedule: Schedule, shuffle: random.Random
) -> None:
    plan = plan_retention(infos, [rule], schedule)
    shuffled = list(infos)
    shuffle.shuffle(shuffled)
    assert plan_retention(shuffled, [rule], schedule) == plan
    assert [*plan.keep] == sorted(plan.keep)
    assert sorted([*plan.keep, *plan.drop]) == sorted(plan.reasons) == sorted(info.step for info in infos)


@every_keep_rule
def test_no_checkpoints_are_no_trouble(rule: KeepRule) -> None:
    schedule = Schedule(10, 1)
    verdict = rule.judge([], schedule)
    assert (dict(verdict.keep), dict(verdict.otherwise)) == ({}, {})
    plan = plan_retention([], [rule], schedule)
    assert (plan.keep, plan.drop, dict(plan.reasons)) == ((), (), {})


@every_keep_rule
@few
@given(infos=checkpoints, schedule=schedules)
def test_a_keep_rule_goes_through_json_and_decides_the_same(
    rule: KeepRule, infos: list[CheckpointInfo], schedule: Schedule
) -> None:
    policy = KeepAny((rule,))
    text = json.dumps(retention_to_json(policy), allow_nan=False)
    again = retention_from_json(json.loads(text))
    assert again == policy
    assert again.plan(infos, schedule) == policy.plan(infos, schedule)
