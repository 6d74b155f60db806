"""Whatever happens to a checkpoints folder, in any order: saves of every kind, death and disk errors at any operation,
resumes, deletions and damage by hand, pins, prunes, other rules, another place. After each, everything that must be
restorable is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from support.checkpoint_machine import FAULTS, SCHEDULE, Disk, Fault, OwnedFolder
from support.checkpoints import KINDS, Died, flip

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.pins import save_pins
from dino_exp.checkpoint.pruning import PruneRules
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.shrinking import Shrinker
from dino_exp.errors import CorruptCheckpointError, UsageError

faults = st.tuples(st.sampled_from(["death", "death", *FAULTS]), st.integers(1, 40))
deaths = st.none() | st.tuples(st.just("death"), st.integers(1, 30))
which = st.integers(0, 11)
places = st.integers(0, 7) | st.integers(8, 15)  # eighths of a file, and near the end of a pack, where its tensors are
metrics = st.sampled_from(["better", "worse", "equal", "NaN", "missing", "infinite"])


class Checkpoints(OwnedFolder):
    """Everything that a training, a command and a person may do to the folder."""

    @initialize(
        last=st.integers(1, 3),
        num_best=st.integers(0, 2),
        beside=st.booleans(),
        first=st.lists(metrics, min_size=1, max_size=4),
    )
    def begin(self, last: int, num_best: int, beside: bool, first: list[str]) -> None:
        self.begin_empty(last, num_best, beside=beside)
        for metric in first:
            self.save(1, metric, healthy=True, marked=False, hear=True)

    # --- a training ---------------------------------------------------------------------------------------------

    @rule(ahead=st.integers(1, 2), metric=metrics, healthy=st.booleans(), marked=st.booleans(), hear=st.booleans())
    def save(self, ahead: int, metric: str, healthy: bool, marked: bool, hear: bool) -> None:
        self.begin_save(self.position + ahead, self.new_fact(self.position + ahead, metric, healthy, marked))
        if hear:
            self.settle()

    @rule(metric=metrics, fault=faults)
    def save_in_trouble(self, metric: str, fault: Fault) -> None:
        self.settle()
        self.begin_save(self.position + 1, self.new_fact(self.position + 1, metric, True, False), fault)
        self.settle()

    @precondition(lambda self: self.may_supersede())
    @rule(metric=metrics, fault=st.none() | faults, again=st.booleans())
    def supersede(self, metric: str, fault: Fault, again: bool) -> None:
        """An evaluation that was owed is added to the checkpoint that this process began with."""
        step = self.position
        fact = replace(self.new_fact(step, metric, True, False), milestone=self.model.facts[step].milestone)
        self.begin_save(step, fact, fault, supersede=True)
        self.settle()
        if again and self.may_supersede():
            self.begin_save(step, fact, supersede=True)
            self.settle()

    def may_supersede(self) -> bool:
        step = self.position
        newest = self.under_way is None and step == max(self.good() & self.known(), default=0)
        return newest and step > 0 and self.wrote[step] != self.attempt

    @precondition(lambda self: self.position)
    @rule()
    def save_the_same_step_again(self) -> None:
        self.settle()
        self.begin_save(self.position, self.new_fact(self.position, "better", True, False))
        self.settle()

    @rule(reopen=st.booleans(), fault=deaths, beside=st.booleans())
    def resume(self, reopen: bool, fault: Fault, beside: bool) -> None:
        """The newest good one is what a resume gives; damaged ones before it are set aside."""
        if reopen:
            self.settle()
            self.beside = beside
            self.open(fault)
            fault = None
        self.settle()
        good = self.good()
        step = max(good & self.known(), default=None)
        if step is not None:
            self.files.arm(fault)
        restored = self.restore("latest", step)
        if restored:
            assert not {other for other in self.known() if other > (step or 0)}
        assert self.good() == good
        for other in self.model.facts.keys() - self.listed():
            self.forget(other)

    @precondition(lambda self: self.model.facts)
    @rule(at=st.just("best") | which)
    def restore_another(self, at: str | int) -> None:
        self.settle()
        good = self.good()
        if at == "best":
            best = self.model.ranking(good & self.known())
            restored = self.restore("best", best[0] if best else None)
        else:
            step = sorted(self.listed())[int(at) % len(self.listed())] if self.listed() else 0
            restored = self.restore(step, step if step in good & self.known() else None)
        if restored:  # it would not save beside what is newer; a process that does not know of it may
            self.open()
        assert self.good() == good
        for other in self.model.facts.keys() - self.listed():
            self.forget(other)

    # --- people and their commands ------------------------------------------------------------------------------

    @precondition(lambda self: self.model.facts)
    @rule(number=which, what=st.sampled_from(["manifest", "pack"]))
    def remove(self, number: int, what: str) -> None:
        step = self.pick(number)
        if step is None:
            return
        self.counts["removed by hand"] += 1
        if what == "pack":
            self.pack_path(step).unlink()
            self.hurt.add(step)
        else:
            self.manifest_path(step).unlink()
            self.forget(step)

    @precondition(lambda self: self.model.facts)
    @rule(number=which, what=st.sampled_from(["manifest", "pack", "pack"]), place=places)
    def flip_a_bit(self, number: int, what: str, place: int) -> None:
        step = self.pick(number)
        if step is None:
            return
        self.counts["bits flipped"] += 1
        path = self.manifest_path(step) if what == "manifest" else self.pack_path(step)
        size = path.stat().st_size
        flip(path, size * (place % 8) // 8 if place < 8 or what == "manifest" else size + 4 * (place - 16))
        self.hurt.add(step)

    @rule()
    def remove_the_registry(self) -> None:
        self.settle()
        (self.folder / "registry.json").unlink(missing_ok=True)

    @precondition(lambda self: self.model.facts)
    @rule(number=which, pinned=st.booleans())
    def pin_or_unpin(self, number: int, pinned: bool) -> None:
        step = self.pick(number)
        if step is None:
            return
        if pinned:
            self.model.pinned.add(step)
        else:
            self.model.pinned.discard(step)
        save_pins(self.folder, dict.fromkeys(self.model.pinned, "kept"), Disk())

    @rule(fault=deaths, last=st.integers(1, 3))
    def prune(self, fault: Fault, last: int) -> None:
        """A command does it while no process owns the folder."""
        self.settle()
        self.model.last = last
        before = self.listed()
        rules = PruneRules(last=last, best=self.model.num_best, metric="knn_top1", mode="max")
        self.files = Disk()
        self.files.arm(fault)
        try:
            ledger = Ledger(self.folder, files=self.files)
            ledger.prune(rules)
            Shrinker(ledger, self.kind.storage).compact(everything=True)
        except Died:
            self.counts["deaths while pruning"] += 1
        except UsageError:  # no checkpoint has that metric
            assert self.listed() == before
        except CorruptCheckpointError:  # what is damaged is not written anew
            assert self.hurt
        self.files.disarm()
        self.nothing_needed_is_gone(before, None, committed=True)
        self.open()

    @rule(last=st.integers(1, 3), num_best=st.integers(0, 2), fault=deaths)
    def other_rules(self, last: int, num_best: int, fault: Fault) -> None:
        self.settle()
        self.model.last, self.model.num_best = last, num_best
        self.open(fault)

    @rule()
    def move(self) -> None:
        self.settle()
        self.folder = self.folder.rename(self.home / f"c{self.attempt}")
        self.open()

    # --- what must hold -----------------------------------------------------------------------------------------

    @invariant()
    def everything_listed_restores(self) -> None:
        reader = CheckpointReader(self.folder)
        if self.under_way is not None:  # others may look at any time
            assert {row["step"] for row in reader.rows()} <= self.model.facts.keys() | {self.under_way.step}
            return
        assert self.listed() == self.model.facts.keys()
        for step in self.listed():
            state = self.kind.make()
            if step in self.hurt:
                with pytest.raises(CorruptCheckpointError):
                    reader.restore(state, step)
                continue
            assert reader.restore(state, step).step == step
            assert state.is_of_step(step)

    @invariant()
    def lists_say_what_is_so(self) -> None:
        if self.under_way is not None:
            return
        infos = {info.step: info for info in self.manager.infos()}
        assert infos.keys() <= self.listed()
        best = self.manager.best()
        assert ([] if best is None else [best.step]) == self.model.ranking(set(infos))[:1]
        plan = self.manager.plan(SCHEDULE)
        assert not set(plan.drop) & self.model.must_stay(set(infos))
        rows = {row["step"]: row["kinds"] for row in CheckpointReader(self.folder).rows()}
        assert infos.keys() - self.hurt <= rows.keys()
        for step, kinds in rows.items() if self.good() else ():  # else nothing may be left to tell the rules
            fact = self.model.facts[step]
            assert ("milestone" in kinds) == fact.milestone
            assert ("pinned" in kinds) == (step in self.model.pinned)
            assert ("latest" in kinds) == (step == max(rows))
            assert ("best" in kinds) == ([step] == self.model.ranking(set(rows))[:1])


class Incremental(Checkpoints):
    """The same with checkpoints that need packs of others, which nobody damages: that would hurt several at once."""

    kind = KINDS["delta"]

    @precondition(lambda self: self.model.facts)
    @rule(number=which)
    def remove_a_manifest(self, number: int) -> None:
        super().remove(number, "manifest")

    @precondition(lambda self: self.model.facts)
    @rule(number=which, place=places)
    def flip_a_bit_of_a_manifest(self, number: int, place: int) -> None:
        super().flip_a_bit(number, "manifest", place)

    def remove(self, number: int, what: str) -> None:
        """No rule here."""

    def flip_a_bit(self, number: int, what: str, place: int) -> None:
        """No rule here."""


def run_machine(machine: type[Checkpoints] = Checkpoints, **options: Any) -> Counter[str]:
    machine.counts = Counter()
    always = {"deadline": None, "derandomize": True, "report_multiple_bugs": False}
    with_all = settings(**always | options, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=with_all)
    return machine.counts


@pytest.mark.parametrize(("machine", "num"), [(Checkpoints, 40), (Incremental, 10)])
def test_any_order_of_events(machine: type[Checkpoints], num: int) -> None:
    counts = run_machine(machine, max_examples=num, stateful_step_count=25, phases=[Phase.generate])
    assert counts["runs"] == counts["runs that ended well"] >= num
    assert counts["saves that died"] >= num // 12


@pytest.mark.crash
@pytest.mark.timeout(7000)
@pytest.mark.parametrize(("machine", "num"), [(Checkpoints, 2000), (Incremental, 300)])
def test_many_orders_of_events(machine: type[Checkpoints], num: int, survived: Callable[[str, int], None]) -> None:
    counts = run_machine(machine, max_examples=num, stateful_step_count=50)
    assert counts["runs"] == counts["runs that ended well"] >= num
    for what, number in counts.items():
        survived(f"{what} of the state machine", number)
