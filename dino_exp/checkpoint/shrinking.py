"""Committed checkpoints made smaller: of old milestones a part is kept, and none keeps packs of dropped ones alive.

A checkpoint is written anew, compared with what it was, and put in the place of the old one by the rename of its
manifest. Only then do packs go that nothing needs any more; so it is safe to stop at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.pruning import foreign_packs, pack_sizes
from dino_exp.checkpoint.rewriting import Rewriter, check_content, live_bytes
from dino_exp.checkpoint.storage import Storage

_MOST_FOREIGN = 1 / 5  # of all bytes: beyond it, packs of dropped checkpoints are worth some rewriting
_LEAST_LIVE = 1 / 2  # of a pack's bytes: below it, that pack is


@dataclass(frozen=True)
class Shrunk:
    """What was done: which steps were thinned, which were only written anew, and how many bytes the disk has back."""

    thinned: tuple[int, ...] = ()
    rewritten: tuple[int, ...] = ()
    freed_bytes: int = 0


class Shrinker:
    """Rewrites checkpoints of a ledger. `guard` is called just before each commit and may raise to prevent it."""

    def __init__(
        self,
        ledger: Ledger,
        storage: Storage,
        guard: Callable[[], object] | None = None,
        wrote: Callable[[int], None] | None = None,
    ) -> None:
        self._ledger, self._storage, self._guard, self._wrote = ledger, storage, guard, wrote

    def thin(self, wanted: Mapping[int, tuple[str, ...]]) -> Shrunk:
        """Keep of each step the tensors whose names begin with one of the given texts; what is pinned stays whole.

        Raises CorruptCheckpointError for pins or a checkpoint that cannot be read, OSError: then the rest is as it was.
        """
        before, done = self._num_bytes(), []
        for step, prefixes in sorted(wanted.items()):
            if step not in self._ledger.rows or step in load_pins(self._ledger.store.folder, self._ledger.store.files):
                continue
            old = self._ledger.read_good(step)
            self._supersede(old, self._rewriter(pack.name for pack in old.packs).rewrite(old, prefixes))
            done.append(step)
        return self._told("thinned", Shrunk(thinned=tuple(done)), before)

    def compact(self, *, everything: bool) -> Shrunk:
        """Free kept checkpoints of packs of dropped ones: of those that are worth it, or of all.

        Raises as `thin`.
        """
        before, done = self._num_bytes(), []
        rewriter = self._rewriter(self._plan(everything=everything))
        for step in sorted(self._ledger.rows):
            if not rewriter.doomed.isdisjoint(self._ledger.rows[step].packs):
                old = self._ledger.read_good(step)
                self._supersede(old, rewriter.rewrite(old))
                done.append(step)
        return self._told("compacted", Shrunk(rewritten=tuple(done)), before)

    def _plan(self, *, everything: bool) -> set[str]:
        foreign = foreign_packs(self._ledger.rows)
        if everything or sum(foreign.values()) > _MOST_FOREIGN * self._num_bytes():
            return set(foreign)
        rows = self._ledger.rows.items()
        reaching = [step for step, row in rows if not foreign.keys().isdisjoint(row.packs)]
        manifests = [self._ledger.store.read(step)[0] for step in reaching]
        return {name for name, size in foreign.items() if live_bytes(manifests, name) < _LEAST_LIVE * size}

    def _rewriter(self, doomed: Iterable[str]) -> Rewriter:
        return Rewriter(self._ledger.store, self._storage, set(doomed), self._wrote)

    def _supersede(self, old: Manifest, new: Manifest) -> None:
        """Put a checkpoint in the place of what it was, once it is known to be as good."""
        ledger, store = self._ledger, self._ledger.store
        names = {pack.name for pack in new.packs} - {pack.name for pack in old.packs}
        try:
            check_content(new, store)
            store.commit(new, self._guard, supersede=True)
        except BaseException:
            ledger.doubt(new.step)
            if store.identity(new.step) == ledger.rows[new.step].identity:
                store.remove_packs(names)
            raise
        ledger.add(new)
        ledger.store.remove_packs(ledger.own_packs([pack.name for pack in old.packs]))

    def _num_bytes(self) -> int:
        return sum(pack_sizes(self._ledger.rows.values()).values())

    def _told(self, kind: str, done: Shrunk, before: int) -> Shrunk:
        shrunk = Shrunk(done.thinned, done.rewritten, before - self._num_bytes())
        steps = [*shrunk.thinned, *shrunk.rewritten]
        if steps:
            self._ledger.tell(kind, steps=steps, freed_bytes=shrunk.freed_bytes)
        return shrunk
