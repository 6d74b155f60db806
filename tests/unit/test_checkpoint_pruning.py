"""What pruning by hand keeps and drops, and that looking at a plan changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import Events, ToyState, flip, open_manager, pack_of, request, save_steps

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.pins import pin
from dino_exp.checkpoint.policies import BestN, EveryNEpochs, KeepAny, LatestN, Milestones, Pinned, milestone_from_text
from dino_exp.checkpoint.pruning import PrunePlan, PruneRules
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import RefusedError, UsageError

ALL = KeepAny((LatestN(99), BestN("knn_top1"), Milestones((milestone_from_text("25%"),))))
KNN, LOSS, HALF = BestN("knn_top1", "max", 2), BestN("loss", "min", 3), Milestones((milestone_from_text("50%"),))
RECORDED = KeepAny((LatestN(5), Pinned(), KNN, LOSS, EveryNEpochs(4), HALF))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (PruneRules(), RECORDED.rules),
        (PruneRules(last=1), (LatestN(1), *RECORDED.rules[1:])),
        (PruneRules(best=7), (*RECORDED.rules[:2], BestN("knn_top1", "max", 7), *RECORDED.rules[3:])),
        (PruneRules(best=1, metric="loss"), (*RECORDED.rules[:3], BestN("loss", "min", 1), *RECORDED.rules[4:])),
        (
            PruneRules(best=1, metric="knn_1shot", mode="max"),
            (*RECORDED.rules[:2], BestN("knn_1shot", "max", 1), *RECORDED.rules[3:]),
        ),
        (
            PruneRules(best=1, metric="knn_top1", mode="min"),
            (*RECORDED.rules[:2], BestN("knn_top1", "min", 1), *RECORDED.rules[3:]),
        ),
    ],
)
def test_an_option_replaces_the_rule_it_is_about(rules: PruneRules, expected: tuple[object, ...]) -> None:
    assert rules.instead_of(RECORDED).rules == expected


def test_milestones_and_pins_count_whatever_is_recorded() -> None:
    assert PruneRules().instead_of(KeepAny(())).rules == (Pinned(), Milestones())
    assert PruneRules(last=2).instead_of(KeepAny((HALF,))).rules == (LatestN(2), HALF, Pinned())


@pytest.mark.parametrize(
    ("rules", "recorded", "says"),
    [
        ({"metric": "loss"}, RECORDED, "--keep-best"),
        ({"mode": "max"}, RECORDED, "--keep-best"),
        ({"best": 1, "mode": "max"}, RECORDED, "--metric"),
        ({"best": 1, "metric": "knn_1shot"}, RECORDED, "high or low knn_1shot"),
        ({"best": 1}, KeepAny((LatestN(1),)), "which metric"),
    ],
)
def test_what_is_not_said_is_asked_for(rules: dict[str, object], recorded: KeepAny, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PruneRules(**rules).instead_of(recorded)  # type: ignore[arg-type]


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in CheckpointReader(folder).rows()]


def prune(folder: Path, rules: PruneRules, events: Events | None = None) -> PrunePlan:
    return Ledger(folder, keep=CheckpointReader(folder).recorded_policy(), on_event=events).prune(rules)


def test_the_plan_is_what_is_done_then(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 9), keep=ALL)
    pin(tmp_path, 4, "for the paper")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    planned = CheckpointReader(tmp_path).plan_prune(PruneRules(last=2, best=2))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    events = Events()
    assert prune(tmp_path, PruneRules(last=2, best=2), events) == planned
    assert (planned.plan.keep, planned.plan.drop) == ((2, 4, 5, 7, 8), (1, 3, 6))
    assert steps(tmp_path) == [2, 4, 5, 7, 8]
    assert [event["step"] for event in events.of("dropped")] == [1, 3, 6]
    assert all(event["reason"] == planned.plan.reasons[event["step"]] for event in events.of("dropped"))
    gone = [path for path in before if not path.exists()]
    assert planned.freed_bytes == sum(len(before[path]) for path in gone)
    assert CheckpointReader(tmp_path).verify() == {"ok": True, "checked": 5, "damaged": []}


def test_what_best_means_and_the_recorded_policy_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 5), keep=ALL)
    prune(tmp_path, PruneRules(last=1, best=1, metric="knn_top1", mode="min"))
    reader = CheckpointReader(tmp_path)
    assert steps(tmp_path) == [2, 3, 4]  # 3 is the worst, 2 the milestone
    assert reader.recorded_policy() == ALL
    assert reader.resolve("best") == 2
    manager = open_manager(tmp_path, keep=ALL)
    manager.save(ToyState(5), request(5))
    assert steps(tmp_path) == [2, 3, 4, 5]


def test_a_metric_that_nobody_measured_drops_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=ALL)
    rules = PruneRules(last=1, best=1, metric="knn_tpo1", mode="max")
    for plan in (CheckpointReader(tmp_path).plan_prune, lambda rules: prune(tmp_path, rules)):
        with pytest.raises(UsageError, match="near: knn_top1"):
            plan(rules)
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("is_known", [True, False])
def test_one_is_read_whole_before_anything_goes(is_known: bool, tmp_path: Path) -> None:
    """The newest is damaged, which the registry, if it is there, does not know: the one before it is read too."""
    save_steps(tmp_path, [1, 2, 3, 4, 5], keep=ALL)
    if not is_known:
        (tmp_path / "registry.json").unlink()
    flip(pack_of(tmp_path, 5))
    planned = CheckpointReader(tmp_path).plan_prune(PruneRules(last=1, best=0))
    assert list(planned.damaged) == [5]
    assert prune(tmp_path, PruneRules(last=1, best=0)) == planned
    assert (planned.plan.keep, planned.plan.drop) == ((2, 4), (1, 3))
    assert steps(tmp_path) == [2, 4, 5]  # the damaged one is left to a resume


def test_with_nothing_good_left_nothing_goes(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=ALL)
    for step in (1, 2, 3):
        flip(pack_of(tmp_path, step))
    planned = prune(tmp_path, PruneRules(last=0, best=0))
    assert (planned.plan.keep, planned.plan.drop) == ((), ())
    assert steps(tmp_path) == [1, 2, 3]


def test_never_below_the_floor(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 3, 4], keep=ALL)
    assert prune(tmp_path, PruneRules(last=0, best=0)).plan.keep == (4,)
    assert open_manager(tmp_path).restore(ToyState()).manifest.step == 4


def test_a_pin_between_plan_and_drop_shows_in_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, [1, 2, 3, 4], keep=ALL)
    hide = Ledger._hide

    def pin_first(ledger: Ledger, step: int, *, heed_pins: bool) -> bool:
        if step == 1:
            pin(tmp_path, 3, "just in time")
        return hide(ledger, step, heed_pins=heed_pins)

    monkeypatch.setattr(Ledger, "_hide", pin_first)
    done = prune(tmp_path, PruneRules(last=1))
    assert (done.plan.keep, done.plan.drop) == ((2, 3, 4), (1,))
    assert done.plan.reasons[3] == "keep: pinned just now"
    assert steps(tmp_path) == [2, 3, 4]


def test_a_policy_of_a_newer_version_drops_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=ALL)
    manifest = CheckpointReader(tmp_path).manifest(3)
    (tmp_path / "step-000000003.json").write_bytes(manifest_to_bytes(replace(manifest, policy=[{"rule": "new"}])))
    with pytest.raises(RefusedError, match="does not know"):
        CheckpointReader(tmp_path).plan_prune(PruneRules(last=1))
    with pytest.raises(RefusedError, match="does not know"):
        CheckpointReader(tmp_path).recorded_policy()


def test_an_empty_folder_has_an_empty_plan(tmp_path: Path) -> None:
    planned = CheckpointReader(tmp_path / "nowhere").plan_prune(PruneRules(last=1))
    assert (planned.infos, planned.plan.keep, planned.plan.drop, planned.freed_bytes) == ((), (), (), 0)
    assert list(tmp_path.iterdir()) == []


def test_what_a_training_drops_while_it_is_read_is_no_damage(tmp_path: Path) -> None:
    """Step 2 is found to be damaged and then dropped, step 3 is dropped before it is read."""
    manager = save_steps(tmp_path, [2, 3, 4], keep=KeepAny((LatestN(3),)))
    flip(pack_of(tmp_path, 2))
    coming = [5, 6]

    def drop_beside(done: int, total: int) -> None:
        while coming:
            manager.save(ToyState(coming[0]), request(coming.pop(0)))

    assert CheckpointReader(tmp_path).verify(progress=drop_beside) == {"ok": True, "checked": 1, "damaged": []}
    assert steps(tmp_path) == [4, 5, 6]


def test_damaged_pins_are_damage_of_no_step(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    (tmp_path / "pins.json").write_text("{")
    found = CheckpointReader(tmp_path).verify()
    assert (found["ok"], found["checked"]) == (False, 1)
    (place,) = found["damaged"]
    assert (place["step"], place["tensor"], place["pack"]) == (None, None, None)
    assert "pins.json" in place["reason"]
    assert CheckpointReader(tmp_path).verify([1])["ok"]
