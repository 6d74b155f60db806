"""Committed checkpoints made smaller: of old milestones a part is kept, and none keeps packs of dropped ones alive.

A checkpoint is written anew, compared with what it was, and put in the place of the old one by the rename of its
manifest. Only then do packs go that nothing needs any more; so it is safe to stop at any point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from dino_exp.checkpoint.ledger import Ledger
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.pruning import Shrunk, foreign_packs, pack_sizes
from dino_exp.checkpoint.rewriting import Rewriter, check_content
from dino_exp.checkpoint.storage import Storage
from dino_exp.errors import CorruptCheckpointError

_MOST_FOREIGN = 1 / 5  # of all bytes: beyond it, packs of dropped checkpoints are worth some rewriting


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

        Damaged ones are noted as such and left alone. Raises CorruptCheckpointError for pins that cannot be read,
        OSError: then the rest is as it was.
        """
        before, done = self._ledger.num_bytes(), []
        for step, prefixes in sorted(wanted.items()):
            old = None if self._is_pinned(step) else self._read(step)
            if old is None or {name.startswith(prefixes) for name in old.tensors} != {True, False}:
                continue  # nothing would go, or nothing would stay
            if self._put_anew(old, self._rewriter(pack.name for pack in old.packs), prefixes):
                done.append(step)
        return self._told("thinned", Shrunk(thinned=tuple(done)), before)

    def compact(self, *, everything: bool) -> Shrunk:
        """Free kept checkpoints of packs of dropped ones: of those that are worth it, or of all.

        Damaged ones are noted as such and left alone. Raises OSError.
        """
        before, done = self._ledger.num_bytes(), []
        rewriter = self._rewriter(self._plan(everything=everything))
        for step in sorted(self._ledger.rows):
            if rewriter.doomed.isdisjoint(self._ledger.rows[step].packs):
                continue
            old = self._read(step)
            if old is not None and self._put_anew(old, rewriter):
                done.append(step)
        return self._told("compacted", Shrunk(rewritten=tuple(done)), before)

    def _read(self, step: int) -> Manifest | None:
        """A step's manifest, if all of it is good. Raises OSError."""
        if step not in self._ledger.rows:
            return None
        try:
            return self._ledger.read_good(step)
        except CorruptCheckpointError as damage:
            self._ledger.note_damage(step, str(damage))
            return None

    def _put_anew(self, old: Manifest, rewriter: Rewriter, prefixes: tuple[str, ...] = ("",)) -> bool:
        """Write a checkpoint anew and put it in the place of what it was; whether that was done.

        Raises OSError, and what the guard raises: then the old one or the new one is there, whole.
        """
        made = rewriter.rewrite(old, prefixes)
        try:
            check_content(made, self._ledger.store, packs={pack.name for pack in made.packs})
        except CorruptCheckpointError as mistake:
            self._ledger.tell("trouble", action=f"write step {old.step} anew", error=str(mistake))
            rewriter.take_back()
            return False
        except BaseException:
            rewriter.take_back()
            raise
        return self._supersede(old, made, rewriter)

    def _is_pinned(self, step: int) -> bool:
        return step in load_pins(self._ledger.store.folder, self._ledger.store.files)

    def _plan(self, *, everything: bool) -> set[str]:
        foreign = foreign_packs(self._ledger.rows)
        total = sum(pack_sizes(self._ledger.rows.values()).values())
        return set(foreign) if everything or sum(foreign.values()) > _MOST_FOREIGN * total else set()

    def _rewriter(self, doomed: Iterable[str]) -> Rewriter:
        return Rewriter(self._ledger.store, self._storage, set(doomed), self._wrote)

    def _supersede(self, old: Manifest, new: Manifest, rewriter: Rewriter) -> bool:
        """Put a checkpoint in the place of what it was; False where somebody has pinned it meanwhile: it stays whole.

        Look at the pins after the rename, while `pins.pin` writes the pin first and looks at the manifest then: so at
        least one of the two sees the other.
        """
        ledger, store, thinned = self._ledger, self._ledger.store, old.resumable and not new.resumable
        before = ledger.rows[new.step].identity
        try:
            store.commit(new, self._guard, supersede=True)
            if thinned and self._is_pinned(new.step):
                store.commit(old, self._guard, supersede=True)
                ledger.add(old)
                rewriter.take_back()
                return False
            ledger.add(new)
        except BaseException:
            ledger.doubt(new.step)  # perhaps after its rename
            if store.identity(new.step) == before:
                rewriter.take_back()
            raise
        store.remove_packs(ledger.own_packs([pack.name for pack in old.packs]))
        return True

    def _told(self, kind: str, done: Shrunk, before: int) -> Shrunk:
        shrunk = Shrunk(done.thinned, done.rewritten, before - self._ledger.num_bytes())
        steps = [*shrunk.thinned, *shrunk.rewritten]
        if steps:
            self._ledger.tell(kind, steps=steps, freed_bytes=shrunk.freed_bytes)
        return shrunk
