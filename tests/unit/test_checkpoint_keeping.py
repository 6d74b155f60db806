"""What holds for keeping over a whole run: forks, one checkpoint only, several bests, metrics that are no numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.checkpoint.policies import (
    AtMilestones,
    BestN,
    EveryNEpochs,
    KeepAny,
    LatestN,
    Milestones,
    Pinned,
    derive_kinds,
    milestone_from_text,
    milestone_steps,
    plan_retention,
    rank_best,
)
from dino_exp.checkpoint.types import CheckpointInfo, SaveContext, Schedule

RUN = Schedule(horizon_steps=100, steps_per_epoch=10)
QUARTERS = tuple(milestone_from_text(text) for text in ("25%", "50%", "75%", "100%"))
METRICS = ("knn_top1", "val_loss", "knn_1shot")


def info(step: int, **fields: object) -> CheckpointInfo:
    return CheckpointInfo(step=step, epoch=step // 10, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fork_step", "horizon", "reason"),
    [
        (50, 200, "keep: milestone 25% of 200 steps"),
        (75, 100, "keep: milestone 75% of 100 steps"),
        (100, 200, "keep: milestone 50% of 200 steps"),
        (100, 400, "keep: milestone 25% of 400 steps"),
        (50, 300, "keep: the newest"),  # half of the parent's 100 steps is nothing here
        (60, 200, "keep: the newest"),  # 25% is past, and is not made up
    ],
)
def test_the_first_checkpoint_of_a_fork_is_a_milestone_of_the_longer_horizon_or_of_none(
    fork_step: int, horizon: int, reason: str
) -> None:
    schedule = Schedule(horizon_steps=horizon, steps_per_epoch=10)
    first = info(fork_step, reasons=("fork",))
    assert plan_retention([first], [Milestones(QUARTERS)], schedule).reasons == {fork_step: reason}
    kinds = derive_kinds(KeepAny((Milestones(QUARTERS),)), [first], schedule)[fork_step]
    assert kinds == (("latest", "milestone") if "milestone" in reason else ("latest",))


@given(st.integers(1, 500), st.data())
def test_a_fork_sees_each_milestone_that_is_left_once(horizon: int, data: st.DataObject) -> None:
    """The steps after the fork, with its own first checkpoint, are all that a longer horizon has of milestones."""
    fork_step = data.draw(st.integers(1, horizon))
    schedule = Schedule(horizon_steps=horizon, steps_per_epoch=max(1, horizon // 10))
    policy, infos = AtMilestones(QUARTERS), [info(fork_step, reasons=("fork",))]
    for step in range(fork_step + 1, horizon + 1):
        reasons = policy.should_save(SaveContext(step=step, schedule=schedule, last_saved_step=fork_step))
        infos += [info(step, reasons=reasons)] if reasons else []
    planned = milestone_steps(QUARTERS, schedule)
    kept = plan_retention(infos, [Milestones(QUARTERS)], schedule)
    found = {step for step in kept.keep if "milestone" in kept.reasons[step]}
    assert found == {step for step in planned if step >= fork_step}
    kinds = derive_kinds(KeepAny((Milestones(QUARTERS),)), infos, schedule)
    assert {step for step, names in kinds.items() if "milestone" in names} == found


saved = st.builds(
    lambda verified, resumable, healthy: {"verified": verified, "resumable": resumable, "healthy": healthy},
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(saved, min_size=1, max_size=30))
def test_one_checkpoint_only_is_always_one_to_go_on_from(saves: list[dict[str, bool]]) -> None:
    """keep.last=1, best=0, applied after each save: the newest that is verified and resumable is never dropped."""
    kept: list[CheckpointInfo] = []
    newest_good: int | None = None
    for step, facts in enumerate(saves, start=1):
        kept.append(info(step, **facts))
        newest_good = step if facts["verified"] and facts["resumable"] else newest_good
        plan = plan_retention(kept, [LatestN(1), Pinned(), Milestones()], RUN)
        kept = [one for one in kept if one.step in plan.keep]
        assert step in plan.keep
        assert newest_good is None or newest_good in plan.keep
        assert max((one.step for one in kept if one.verified and one.resumable), default=None) == newest_good


@given(st.integers(1, 30))
def test_one_checkpoint_only_leaves_one_when_all_is_well(num: int) -> None:
    kept: list[CheckpointInfo] = []
    for step in range(1, num + 1):
        plan = plan_retention([*kept, info(step)], [LatestN(1)], RUN)
        kept = [one for one in [*kept, info(step)] if one.step in plan.keep]
        assert [one.step for one in kept] == [step]


measured = st.lists(
    st.builds(
        info,
        st.integers(1, 100),
        metrics=st.dictionaries(st.sampled_from(METRICS), st.one_of(st.floats(), st.just(math.nan))),
        healthy=st.booleans(),
    ),
    unique_by=lambda one: one.step,
    max_size=20,
)
bests = st.lists(
    st.builds(BestN, st.sampled_from(METRICS), st.sampled_from(["max", "min"]), st.integers(0, 4)), max_size=5
)


@pytest.mark.parametrize("mode", ["max", "min"])
@given(infos=measured)
def test_only_numbers_of_healthy_models_rank(mode: str, infos: list[CheckpointInfo]) -> None:
    ranked = BestN("val_loss", mode).rank(infos)
    values = [one.metrics["val_loss"] for one in ranked]
    assert values == sorted(values, reverse=mode == "max")
    able = [one for one in infos if one.healthy and math.isfinite(one.metrics.get("val_loss", math.nan))]
    assert sorted(one.step for one in ranked) == sorted(one.step for one in able)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_never_wins_in_either_mode(mode: str, odd: float) -> None:
    infos = [info(1, metrics={"val_loss": odd}), info(2, metrics={"val_loss": 0.5}), info(3)]
    assert [one.step for one in BestN("val_loss", mode).rank(infos)] == [2]


@given(measured, bests)
def test_several_bests_by_several_metrics_are_each_kept(infos: list[CheckpointInfo], rules: list[BestN]) -> None:
    plan = plan_retention(infos, [LatestN(1), *rules], RUN)
    for rule in rules:
        for rank, one in enumerate(rule.rank(infos)[: rule.num], start=1):
            assert one.step in plan.keep
            wanted = f"best {rule.metric} {one.metrics[rule.metric]:.6g} (rank {rank} of {rule.num})"
            assert wanted in plan.reasons[one.step]


@given(measured, bests)
def test_best_is_one_checkpoint_the_one_that_the_first_rule_means(
    infos: list[CheckpointInfo], rules: list[BestN]
) -> None:
    policy = KeepAny((LatestN(1), *rules))
    kinds = derive_kinds(policy, infos, RUN)
    assert [step for step, names in kinds.items() if "best" in names] == [
        one.step for one in rank_best(policy, infos)[:1]
    ]
    for rule in rules[1:]:
        assert all(f"best:{rule.metric}" in kinds[one.step] for one in rule.rank(infos)[:1])
    assert all(len(set(names)) == len(names) for names in kinds.values())


def test_kinds_of_two_metrics() -> None:
    infos = [
        info(10, metrics={"knn_top1": 0.9, "val_loss": 3.0}),
        info(20, metrics={"knn_top1": 0.8, "val_loss": 1.0}),
        info(30, metrics={"knn_top1": 0.7, "val_loss": 2.0}),
    ]
    policy = KeepAny((BestN("knn_top1"), BestN("val_loss", "min"), BestN("val_loss", "max")))
    assert derive_kinds(policy, infos, RUN) == {
        10: ("best", "best:val_loss"),
        20: ("best:val_loss",),
        30: ("latest",),
    }


@given(st.sets(st.integers(1, 100), max_size=40), st.integers(1, 12), st.integers(1, 12))
def test_every_nth_epoch_of_those_saved_at_its_end(steps: set[int], num_epochs: int, steps_per_epoch: int) -> None:
    schedule = replace(RUN, steps_per_epoch=steps_per_epoch)
    plan = plan_retention([info(step) for step in steps], [EveryNEpochs(num_epochs)], schedule)
    kept = {step for step in steps if plan.reasons[step] == f"keep: every {num_epochs} epochs"}
    assert kept == {step for step in steps if step % (num_epochs * steps_per_epoch) == 0}
