"""A folder of checkpoints, the process that owns it, and a small model of what must be restorable.

The rules and what must hold after each of them are in `crash/test_state_machine.py`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis.stateful import RuleBasedStateMachine

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.policies import BestN, KeepAny, LatestN, Milestones, Pinned, milestone_from_text
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import CheckpointInfo, Schedule
from dino_exp.errors import CorruptCheckpointError, NoCheckpointError, SaveFailedError
from support.checkpoints import KINDS, Died, FaultyFiles, Kind, io_error, no_space, request

SCHEDULE = Schedule(horizon_steps=400, steps_per_epoch=4)
AT_MILESTONES = {4, 12}  # the steps of these two:
MILESTONES = Milestones(tuple(map(milestone_from_text, ("1", "3%"))))
MARKED = "milestone of an earlier setting"

FAULTS: dict[str, tuple[Any, bool]] = {  # what comes, and whether only once
    "death": (Died, False),
    "full": (no_space, True),
    "full for long": (no_space, False),
    "no room": (no_space, True),
    "error": (io_error, True),
    "dead disk": (io_error, False),
}
Fault = tuple[str, int] | None  # which, and at how many file operations from now


class Disk(FaultyFiles):
    """Real files without syncing, until the armed fault strikes. While `full`, nothing new can be made."""

    def __init__(self) -> None:
        super().__init__(0, once=True)
        self.full = False

    def create(self, path: Path) -> Any:
        if self.full:
            raise no_space()
        return super().create(path)

    def arm(self, fault: Fault) -> None:
        if fault is not None:
            kind, after = fault
            self.full = kind == "no room"
            self.error, self.once = FAULTS[kind]
            self.fail_at = 0 if self.full else self.num_calls + after

    def disarm(self) -> bool:
        """No fault from now on; whether one had struck."""
        struck = self.full or 0 < self.fail_at <= self.num_calls
        self.fail_at, self.once, self.full = 0, True, False
        return struck


@dataclass(frozen=True)
class Fact:
    """What is known of one checkpoint."""

    value: float | None
    healthy: bool
    milestone: bool

    @property
    def ranks(self) -> bool:
        return self.healthy and self.value is not None and math.isfinite(self.value)


@dataclass
class Model:
    """What must be restorable."""

    last: int
    num_best: int
    facts: dict[int, Fact] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)

    def ranking(self, steps: set[int]) -> list[int]:
        """Those that rank, the highest value first, of equal ones the earliest."""
        ranked = [step for step in steps if self.facts[step].ranks]
        return sorted(ranked, key=lambda step: (-(self.facts[step].value or 0.0), step))

    def must_stay(self, steps: set[int]) -> set[int]:
        """Those of `steps` that no retention may drop."""
        newest_first = sorted(steps, reverse=True)
        newest = newest_first[: max(self.last, 1)]
        healthy = [step for step in newest_first if self.facts[step].healthy][:1]
        for_ever = {step for step in steps if step in self.pinned or self.facts[step].milestone}
        return {*newest, *healthy, *self.ranking(steps)[: self.num_best], *for_ever}


def fact_of(info: CheckpointInfo) -> Fact:
    return Fact(info.metrics.get("knn_top1"), info.healthy, info.step in AT_MILESTONES or MARKED in info.reasons)


def same(one: Fact, other: Fact) -> bool:
    return repr(one) == repr(other)  # NaN is NaN here


@dataclass(frozen=True)
class Save:
    """A save under way: its step, what is said of it, what was listed before, and the files that the step had."""

    step: int
    fact: Fact
    supersede: bool
    before: set[int]
    files: tuple[bytes, ...] | None


class OwnedFolder(RuleBasedStateMachine):
    """What the rules are made of."""

    counts: ClassVar[Counter[str]] = Counter()
    kind: ClassVar[Kind] = KINDS["raw"]

    def begin_empty(self, last: int, num_best: int, *, beside: bool) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="machine-"))
        self.folder = self.home / "c0"
        self.model = Model(last, num_best)
        self.attempt = self.position = 0
        self.hurt: set[int] = set()  # by hand
        self.wrote: dict[int, int] = {}  # which attempt
        self.under_way: Save | None = None
        self.beside = beside
        self.open()

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.counts["runs"] += 1
            self.settle()
            shutil.rmtree(self.home)
            self.counts["runs that ended well"] += 1

    # --- what there is ------------------------------------------------------------------------------------------

    def listed(self) -> set[int]:
        return {int(path.name[5:14]) for path in self.folder.glob("step-?????????.json")}

    def good(self) -> set[int]:
        return self.listed() - self.hurt

    def known(self) -> set[int]:
        """What the manager knows of: not a commit that it could not read back from a disk that was dead."""
        return {info.step for info in self.manager.infos()}

    def keep(self) -> KeepAny:
        rules = (LatestN(self.model.last), Pinned(), BestN("knn_top1", "max", self.model.num_best), MILESTONES)
        return KeepAny(rules)

    def open(self, fault: Fault = None) -> None:
        """A new process takes over; one that dies at it is followed by another."""
        before = self.listed() if self.folder.exists() else set()
        while True:
            self.attempt += 1
            self.files = Disk()
            self.files.arm(fault)
            try:
                self.manager = self.new_manager()
                break
            except (Died, OSError):
                self.counts["deaths and errors at opening"] += 1
                fault = None
        self.files.disarm()
        assert self.listed() == before, "opening drops nothing"
        self.position = max(before, default=0)
        self.nothing_is_left_over()

    def new_manager(self) -> CheckpointManager:
        return self.kind.open_manager(
            self.folder, attempt=self.attempt, files=self.files, keep=self.keep(), background=self.beside
        )

    def nothing_is_left_over(self) -> None:
        """After opening: manifests, their packs, and the few other files, unless a manifest cannot be read."""
        names = {path.name for path in self.folder.iterdir()}
        extra = names - {path.name for path in self.folder.glob("step-*.json")}
        assert extra <= {"packs", "quarantine", "registry.json", "pins.json"}, extra
        reader = CheckpointReader(self.folder)
        readable = {row["step"] for row in reader.rows()}
        if readable == self.listed() and not (self.hurt and self.kind.storage.codec == "delta"):  # they may need any
            named = {pack.name for step in readable - self.hurt for pack in reader.manifest(step).packs}
            packs = {path.name for path in (self.folder / "packs").iterdir()}
            assert packs - named == {name for name in packs if int(name[5:14]) in self.hurt}, packs

    # --- saving -------------------------------------------------------------------------------------------------

    def new_fact(self, step: int, metric: str, healthy: bool, marked: bool) -> Fact:
        best = next(iter(self.model.ranking(set(self.model.facts))), None)
        value = 0.0 if best is None else self.model.facts[best].value or 0.0
        values = {
            "better": value + 1, "worse": value - 1, "equal": value, "NaN": math.nan, "infinite": math.inf,
        }  # fmt: skip
        return Fact(values.get(metric), healthy, marked or step in AT_MILESTONES)

    def begin_save(self, step: int, fact: Fact, fault: Fault = None, *, supersede: bool = False) -> None:
        self.hear()
        asked = request(
            step,
            schedule=SCHEDULE,
            metrics={} if fact.value is None else {"knn_top1": fact.value},
            healthy=fact.healthy,
            reasons=(MARKED,) if fact.milestone and step not in AT_MILESTONES else ("every 1 steps",),
        )
        self.under_way, self.position = Save(step, fact, supersede, self.listed(), self.looks(step)), step
        self.files.arm(fault)
        self.manager_does(lambda: self.manager.save(self.kind.make(step), asked, supersede=supersede))

    def hear(self) -> None:
        """Wait for a save under way as a loop does, with `poll`."""
        while self.under_way is not None:
            if not self.manager.is_saving:
                self.manager_does(self.manager.poll)
                if self.under_way is not None:
                    self.note_end(None, "done")

    def settle(self) -> None:
        """Wait for a save under way."""
        if self.under_way is not None:
            self.manager_does(self.manager.drain)
        if self.under_way is not None:
            self.note_end(None, "done")

    def manager_does(self, work: Callable[[], Manifest | None]) -> None:
        try:
            manifest = work()
        except Died:
            self.note_end(None, "died")
            self.open()
        except SaveFailedError:
            self.note_end(None, "failed")
        else:
            if manifest is not None:
                self.note_end(manifest, "done")

    def note_end(self, manifest: Manifest | None, end: str) -> None:
        """A save has come to an end: what is on the disk now, and was nothing lost?"""
        assert self.under_way is not None
        save, self.under_way = self.under_way, None
        step, before = save.step, save.before
        self.counts[f"saves that {'were done' if end == 'done' else end}"] += 1
        struck = self.files.disarm()
        stood = self.model.facts.get(step)
        if step in self.listed():
            self.adopt(save)
        if manifest is not None:
            assert manifest.step == step
            assert step in self.good() or step < max(before), "only what is older than others may go at once"
        elif end == "done":
            assert step in before, "a step that is there already is not saved again"
            assert stood is not None
            assert same(self.model.facts[step], stood)
            assert not save.supersede
        self.nothing_needed_is_gone(before, coming=(step, save.fact), committed=step in self.good() and end != "failed")
        if manifest is not None and not struck and step == max(self.listed()):
            self.nothing_else_is_kept()

    def adopt(self, save: Save) -> None:
        """A step is on the disk that a save was begun for: the manifest says which of the two facts hold."""
        step = save.step
        known = [found for found in (self.model.facts.get(step), save.fact) if found is not None]
        info = next((info for info in CheckpointReader(self.folder).infos() if info.step == step), None)
        if info is None:
            assert step in self.hurt
            return
        assert any(same(fact_of(info), one) for one in known), (info, known)
        self.model.facts[step] = fact_of(info)
        try:
            manifest = CheckpointReader(self.folder).manifest(step)
        except CorruptCheckpointError:
            assert step in self.hurt
            return
        if self.looks(step) not in (None, save.files):
            self.hurt.discard(step)
        self.wrote[step] = manifest.attempt

    def looks(self, step: int) -> tuple[bytes, ...] | None:
        """The bytes of a step's manifest and packs; None where one of these is missing."""
        manifest, packs = self.manifest_path(step), sorted((self.folder / "packs").glob(f"step-{step:09d}.*"))
        return (manifest.read_bytes(), *(pack.read_bytes() for pack in packs)) if manifest.exists() and packs else None

    def pack_path(self, step: int) -> Path:
        return self.folder / "packs" / f"step-{step:09d}.a{self.wrote[step]:03d}.r00000.safetensors"

    def manifest_path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.json"

    def nothing_needed_is_gone(self, before: set[int], coming: tuple[int, Fact] | None, *, committed: bool) -> None:
        """What retention dropped is what it may drop, and good states were not dropped for the sake of bad ones."""
        gone = before - self.listed()
        if coming is not None and coming[0] in gone & self.hurt:  # set aside before it is saved anew
            gone, before = gone - {coming[0]}, before - {coming[0]}
            self.forget(coming[0])
        whole = replace(self.model, facts=dict(self.model.facts))
        steps = set(before)
        if coming is not None:
            steps.add(coming[0])
            whole.facts[coming[0]] = self.model.facts[coming[0]] if committed else coming[1]
        assert not gone & whole.must_stay(steps), (gone, steps)
        if not committed:  # room was made for it
            assert not gone & Model(1, 0, self.model.facts).must_stay(before), (gone, before)
        assert self.good() or not before - self.hurt, "the last good one is gone"
        for step in gone:
            self.forget(step)

    def nothing_else_is_kept(self) -> None:
        """After a save without trouble, unless something is damaged, which retention does not count."""
        if not self.hurt and self.known() == self.listed():
            assert self.known() == self.model.must_stay(self.known())

    def forget(self, step: int) -> None:
        for facts in (self.model.facts, self.wrote):
            facts.pop(step, None)
        self.hurt.discard(step)

    # --- restoring ----------------------------------------------------------------------------------------------

    def restore(self, at: str | int, expected: int | None) -> bool:
        state = self.kind.make()
        try:
            if expected is None:
                with pytest.raises(NoCheckpointError):
                    self.manager.restore(state, at=at)
                return False
            restored = self.manager.restore(state, at=at)
        except Died:
            self.counts["deaths while restoring"] += 1
            self.open()
            return False
        finally:
            self.files.disarm()
        assert restored.manifest.step == expected
        assert state.is_of_step(expected)
        self.position = expected
        return True

    def pick(self, number: int) -> int | None:
        """One of the good checkpoints."""
        self.settle()
        found = sorted(self.good())
        return found[-1 - number % len(found)] if found else None
