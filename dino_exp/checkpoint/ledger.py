"""What is committed in one checkpoints folder, for the one process that may change it.

Opening sweeps what dead writers left and reconciles the registry; retention, quarantine and the registry follow
each change. Needs no torch, so that commands which only look after checkpoints start at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dino_exp.checkpoint.manifest import Manifest, chain_length
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.policies import KeepAny, Pinned, rank_best, retention_to_json
from dino_exp.checkpoint.pruning import PrunePlan, PruneRules, as_done, plan_prune
from dino_exp.checkpoint.registry import Row, read_index, row_of, write_registry
from dino_exp.checkpoint.stock import is_whole, mark_verified, sort_rows, verify_newest
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import CheckpointInfo, OnEvent, RetentionPlan, Schedule, UnsupportedFormatError
from dino_exp.checkpoint.verify import read_verified
from dino_exp.errors import CorruptCheckpointError
from dino_exp.fsio import LOCAL, Files

log = logging.getLogger(__name__)


class Ledger:
    """The committed and the damaged checkpoints of one folder. One thread at a time.

    `keep` is the retention policy; None takes the one that the newest manifest recorded. `on_event(kind, **fields)`
    hears of dropped, quarantined, swept and trouble.

    Raises UnsupportedFormatError where a newer version has written, CorruptCheckpointError for a folder that
    leads elsewhere, OSError.
    """

    def __init__(
        self, directory: Path, *, keep: KeepAny | None = None, on_event: OnEvent | None = None, files: Files = LOCAL
    ) -> None:
        self.store = Store(directory, files)
        self.rows: dict[int, Row] = {}
        self.damaged: dict[int, str] = {}
        self._doubtful: set[int] = set()
        self._stuck: set[int] = set()  # damaged, and the disk did not let us move them
        self._confirmed: set[int] = set()  # steps whose manifests were read by this process
        self._on_event = on_event
        self.store.prepare()
        self._restore_pinned()
        index = read_index(self.store)
        self.keep = index.retention() if keep is None else keep
        self.schedule: Schedule | None = index.schedule
        self._take_stock(index.rows, index.damaged)
        if not index.current and index.schedule is not None:
            self._write_registry(index.policy, index.schedule)

    def _restore_pinned(self) -> None:
        """Bring back what a process that died had hidden, and not yet seen to be pinned (see `_hide`).

        Pins that cannot be read may be of any step. One without its packs was already being erased: whoever pinned
        it since then was told that it is gone.
        """
        hidden = self.store.hidden_steps()
        if not hidden:
            return
        try:
            pinned = set(load_pins(self.store.folder, self.store.files))
        except CorruptCheckpointError:
            pinned = set(hidden)
        for step in hidden:
            if step not in pinned:
                continue
            self.store.unhide(step)
            if not is_whole(self.store, step):
                self.store.hide(step)

    def _take_stock(self, rows: Mapping[int, Row], damaged: Mapping[int, str]) -> None:
        """Sort rows into whole and damaged by the sizes of their packs, and sweep what no manifest reaches."""
        self.rows, self.damaged = sort_rows(self.store, rows, damaged)
        swept = self.store.sweep(None if damaged else self._reached(rows))  # a damaged one may reach any pack
        if swept:
            self.tell("swept", names=swept)

    def _reached(self, rows: Mapping[int, Row]) -> set[str]:
        """The packs that manifests reach.

        The index is believed as long as nothing is to be removed on its word, which may be a stranger's; and for a
        manifest that turns out to be damaged in its middle, which only the index can still speak for.
        """
        reached = {name for row in rows.values() for name in row.packs}
        if reached.issuperset(self.store.packs()):
            return reached
        for step in rows:
            with contextlib.suppress(CorruptCheckpointError):
                manifest, _ = self.store.read(step, with_tensors=False)
                reached |= {pack.name for pack in manifest.packs}
        return reached

    @property
    def latest_step(self) -> int | None:
        """The newest step on disk, damaged or not: None means that nothing was ever saved here.

        But for damaged ones that should be in quarantine: a save of such a step is not done yet.
        """
        return max([*self.rows, *(self.damaged.keys() - self._stuck)], default=None)

    def infos(self) -> list[CheckpointInfo]:
        """Checkpoints by step ascending, with their pins. Raises CorruptCheckpointError if pins cannot be read."""
        self.forget_removed()
        pins = load_pins(self.store.folder, self.store.files)
        return [replace(row.info, pinned=step in pins) for step, row in sorted(self.rows.items())]

    def ranked(self) -> list[CheckpointInfo]:
        """By the retention policy's first metric, best first."""
        self.forget_removed()
        return rank_best(self.keep, [row.info for row in self.rows.values()])

    def plan(self, schedule: Schedule, *, coming: CheckpointInfo | None = None) -> RetentionPlan:
        """What retention would keep and drop now, or once `coming` is there too, and why. Nothing is changed."""
        infos = self.infos()
        if coming is not None:  # it may be there already, and about to be superseded
            infos = [*(info for info in infos if info.step != coming.step), coming]
        return self.keep.plan(infos, schedule)

    def add(self, manifest: Manifest) -> CheckpointInfo:
        """Note a commit that was read back and found good."""
        identity = self.store.identity(manifest.step)
        assert identity is not None
        row = self.rows[manifest.step] = row_of(manifest, identity, verified=True)
        self.damaged.pop(manifest.step, None)
        self._confirmed.add(manifest.step)
        return row.info

    def forget_removed(self) -> None:
        """What somebody removed by hand counts no more; its packs are swept at the next start. Raises OSError.

        Retention would stumble over it at each save, and keep a checkpoint less. A doubtful one that was replaced
        after all is not what is known of it: the next save of that step finds it there, or the next start.
        """
        for step in self.rows.keys() - set(self.store.steps()):
            del self.rows[step]
        for step in self._doubtful & self.rows.keys():
            if self.store.identity(step) != self.rows[step].identity:
                del self.rows[step]
        self._doubtful.clear()

    def newest_base(self, step: int, max_chain: int) -> Manifest | None:
        """What the checkpoint of a step may be written against: the newest up to it, if its own chain is not too long.

        None where there is none such, also where its manifest cannot be read, which is noted. Raises OSError.
        """
        self.forget_removed()
        newest = max((other for other, row in self.rows.items() if other <= step and row.info.resumable), default=None)
        if newest is None:
            return None
        try:
            manifest, _ = self.store.read(newest)
        except CorruptCheckpointError as damage:
            self.note_damage(newest, str(damage))
            return None
        return manifest if chain_length(manifest) <= max_chain else None

    def note_damage(self, step: int, reason: str) -> None:
        """A checkpoint that could not be read: from now on it counts for nothing. It stays where it is."""
        self.tell("trouble", action=f"read step {step}", error=reason)
        self.damaged[step] = reason
        self.rows.pop(step, None)

    def doubt(self, step: int) -> None:
        """A save of this step failed, perhaps after its rename."""
        self._doubtful.add(step)

    def holds(self, step: int) -> bool:
        """Whether a step is committed, still there, and not known to be damaged."""
        if step not in self.rows or step in self.damaged:
            return False
        with contextlib.suppress(OSError):
            self.forget_removed()
        return step in self.rows

    def mark_verified(self, step: int) -> None:
        """Every byte of it was read and found good."""
        self.rows[step] = mark_verified(self.rows[step])

    def verify_one(self) -> int | None:
        """See to it that one resumable checkpoint is verified, so that retention may drop others; its step.

        Damaged ones on the way are noted as such. None where no good one is left. Raises OSError.
        """
        return verify_newest(self.store, self.rows, self.damaged)

    def retain(self, schedule: Schedule) -> RetentionPlan | None:
        """Drop what no rule keeps, and renew the registry; the plan, of which what is to be thinned is left to do.

        Trouble is told, and tried again after the next save: what was saved is safe.
        """
        plan = None
        try:
            plan = self.plan(schedule)
            self.apply(plan)
        except (OSError, CorruptCheckpointError) as problem:
            self.tell("trouble", action="retention", error=str(problem))
        self.renew_registry(schedule)
        return plan

    def renew_registry(self, schedule: Schedule) -> None:
        """Write the registry as things are now."""
        self.schedule = schedule
        self._write_registry(retention_to_json(self.keep), schedule)

    def apply(self, plan: RetentionPlan) -> list[int]:
        """Carry out a plan: manifests first, then the packs that nothing else reaches; the steps that are gone.

        A step that was pinned after the plan stays, if `keep` goes by pins. Raises OSError, CorruptCheckpointError if
        pins cannot be read.
        """
        return self._drop(plan, heed_pins=Pinned() in self.keep.rules)

    def prune(self, rules: PruneRules) -> PrunePlan:
        """Drop what the recorded policy, as `rules` change it, does not keep; what was planned and done.

        `keep` must be the recorded policy. One resumable checkpoint is read whole first and stays, whatever was found
        when it was saved: disks rot, and by hand people prune months later. While none is good, all that a run could
        go on from stay. Raises UsageError as `plan_prune`, OSError, CorruptCheckpointError.
        """
        verify_newest(self.store, self.rows, self.damaged, afresh=True)
        schedule, rows = self.schedule or Schedule(1, 1), dict(self.rows)
        pins = load_pins(self.store.folder, self.store.files)
        planned = plan_prune(rows, pins, self.damaged, recorded=self.keep, rules=rules, schedule=schedule)
        before = self.num_bytes()
        try:
            dropped = self._drop(planned.plan, heed_pins=True)
        finally:
            self.renew_registry(schedule)
        return as_done(planned, dropped, self.rows, before - self.num_bytes())

    def num_bytes(self) -> int:
        """What packs and manifests take on the disk."""
        paths = [*map(self.store.manifest_path, self.store.steps())]
        paths += [self.store.packs_folder / name for name in self.store.packs()]
        return sum(self.store.files.size(path) or 0 for path in paths)

    def _drop(self, plan: RetentionPlan, *, heed_pins: bool) -> list[int]:
        dropped = []
        for step in plan.drop:
            if not self._hide(step, heed_pins=heed_pins):
                continue
            packs = self.own_packs(self.rows.pop(step).packs)
            self.tell("dropped", step=step, reason=plan.reasons[step])
            self.store.erase(step, packs)
            dropped.append(step)
        return dropped

    def _hide(self, step: int, *, heed_pins: bool) -> bool:
        """Begin to drop a step; False where somebody has pinned it since the plan, so that it is there again.

        Hide first and look at the pins then, while `pins.pin` writes the pin first and looks for the manifest then.

        So at least one of the two sees the other, and no pin is lost silently, without a lock that could keep a
        training waiting.
        """
        self.store.hide(step)
        if not heed_pins:
            return True
        try:
            pinned = step in load_pins(self.store.folder, self.store.files)
        except (OSError, CorruptCheckpointError):
            self.store.unhide(step)
            raise
        if pinned:
            self.store.unhide(step)
        return not pinned

    def make_room(self, coming: CheckpointInfo, schedule: Schedule) -> bool:
        """Drop now what retention would drop once `coming` is committed; whether anything went.

        For a full disk only. What the floor of today's checkpoints keeps stays, and of these the newest is read whole
        first: the coming one may fail again, so at no moment is there less than one verified, resumable state. Raises
        OSError, CorruptCheckpointError.
        """
        self.forget_removed()
        if verify_newest(self.store, self.rows, self.damaged, afresh=True) is None:
            return False
        after, floor = self.plan(schedule, coming=coming), KeepAny(()).plan(self.infos(), schedule)
        drop = tuple(step for step in after.drop if step in floor.drop and step != coming.step)
        reasons = {step: f"{after.reasons[step]}; early, because the disk is full" for step in drop}
        return bool(self.apply(RetentionPlan(keep=(), drop=drop, reasons=reasons)))

    def own_packs(self, packs: Collection[str], without: int | None = None) -> list[str]:
        """Those of `packs` that no checkpoint on the disk (but `without`) reaches, not even one not known of here.

        None of them while there is one that cannot be read: it may need any. Once that is set aside, a start sweeps.
        """
        reached = {name for row in self.rows.values() for name in row.packs}
        here = set(self.store.steps())
        for step in (here - self.rows.keys() | here & self._doubtful) - {without}:
            try:
                manifest, _ = self.store.read(step, with_tensors=False)
            except FileNotFoundError:
                continue
            except (CorruptCheckpointError, UnsupportedFormatError):
                return []
            reached |= {pack.name for pack in manifest.packs}
        return self._confirmed_free([name for name in packs if name not in reached])

    def _confirmed_free(self, packs: list[str]) -> list[str]:
        """Nothing goes on the word of the index, which may be a stranger's: each manifest is asked, once."""
        for step in self.rows.keys() - self._confirmed if packs else ():
            with contextlib.suppress(CorruptCheckpointError, FileNotFoundError):
                manifest, identity = self.store.read(step, with_tensors=False)
                self.rows[step] = row_of(manifest, identity, verified=self.rows[step].info.verified)
                self._confirmed.add(step)
        reached = {name for row in self.rows.values() for name in row.packs}
        return [name for name in packs if name not in reached]

    def set_aside(self, step: int) -> bool:
        """Move a damaged checkpoint to quarantine; whether the disk let us. Trouble is told: it counts for nothing.

        A save of that step tries again, and so does the next start.
        """
        try:
            self.quarantine(step)
        except OSError as problem:
            self._stuck.add(step)
            self.tell("trouble", action=f"move step {step} to quarantine", error=str(problem))
            return False
        return True

    def quarantine(self, step: int) -> None:
        """Move a damaged checkpoint aside, with the reason. Raises OSError."""
        row = self.rows.pop(step, None)
        packs = self.store.packs_of_step(step) if row is None else list(row.packs)
        reason = self.damaged[step]
        others = {name for row in self.rows.values() for name in row.packs}
        folder = self.store.quarantine(step, [name for name in packs if name not in others], reason)
        del self.damaged[step]
        self._stuck.discard(step)
        self.tell("quarantined", step=step, reason=reason, folder=folder.name)

    def candidates(self, at: str | int) -> list[int]:
        """The steps that "latest", "best" or a step may be restored from, in the order of preference."""
        if at == "latest":
            resumable = [step for step, row in self.rows.items() if row.info.resumable]
            return sorted({*resumable, *self.damaged}, reverse=True)
        if at == "best":
            return [info.step for info in self.ranked() if info.resumable]
        return [step for step in {*self.rows, *self.damaged} if step == at]

    def read(self, step: int) -> Manifest:
        """A step's manifest, sealed and well formed. Raises CorruptCheckpointError, OSError."""
        if step in self.damaged:
            raise CorruptCheckpointError(self.damaged[step])
        try:
            return self.store.read(step)[0]
        except FileNotFoundError as problem:
            raise CorruptCheckpointError(f"the manifest of step {step} is gone") from problem

    def read_good(self, step: int) -> Manifest:
        """A step's manifest, every byte that it names checked. Raises CorruptCheckpointError, OSError."""
        if step in self.damaged:
            raise CorruptCheckpointError(self.damaged[step])
        return read_verified(self.store, step)

    def tell(self, kind: str, **fields: Any) -> None:
        """Log what happened, aloud where it is bad, and pass it on."""
        level = logging.WARNING if kind in ("quarantined", "trouble") else logging.INFO
        log.log(level, "%s %s", kind, " ".join(f"{name}={value}" for name, value in fields.items()))
        if self._on_event is not None:
            self._on_event(kind, **fields)

    def _write_registry(self, policy: Any, schedule: Schedule) -> None:
        try:
            write_registry(self.store, self.rows.values(), policy, schedule)
        except OSError as problem:  # derived: losing it costs a rescan
            self.tell("trouble", action="write registry", error=str(problem))
