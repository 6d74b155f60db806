"""The reading side: list, show, verify and load checkpoints.

Creates nothing, and imports torch only to load tensors.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dino_exp.checkpoint.absent import listed, no_checkpoint
from dino_exp.checkpoint.canonical import metrics_to_json
from dino_exp.checkpoint.layout import parse_manifest_name
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.policies import KeepAny, derive_kinds, rank_best, retention_from_json
from dino_exp.checkpoint.pruning import PrunePlan, PruneRules, freed_bytes, plan_prune, shared_bytes, thin_gain, without
from dino_exp.checkpoint.registry import Index, Row, read_index
from dino_exp.checkpoint.stock import sort_rows, verify_newest
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import JSON, CheckpointInfo, Schedule, Stateful, UnsupportedFormatError
from dino_exp.checkpoint.verify import Damage, Seen, find_damage, read_verified
from dino_exp.errors import ConfigError, CorruptCheckpointError, RefusedError, UsageError
from dino_exp.fsio import LOCAL, Files

if TYPE_CHECKING:
    from torch import Tensor

    from dino_exp.checkpoint.writers import Writers

log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Listing:
    """Rows for people and programs, the policy that the newest one records, and how many manifests are unreadable.

    `disk_bytes` are those of all their files, each once.
    """

    rows: list[dict[str, JSON]]
    policy: KeepAny
    num_unreadable: int
    disk_bytes: int


class CheckpointReader:
    """Looks at the checkpoints folder of one run, which may be in use, damaged, or absent.

    Raises CorruptCheckpointError for a folder that leads elsewhere.
    """

    def __init__(self, directory: Path | str, files: Files = LOCAL) -> None:
        self._store = Store(Path(directory), files)
        self._store.refuse_links()

    def infos(self) -> list[CheckpointInfo]:
        """Facts about each readable checkpoint, by step ascending.

        Raises CorruptCheckpointError for bad pins.
        """
        return self._infos(read_index(self._store))

    @property
    def folder(self) -> Path:
        """Where they lie, below their run."""
        return self._store.folder

    def steps(self) -> list[int]:
        """The steps that have a manifest, readable or not, ascending."""
        return self._store.steps()

    def num_found(self) -> int:
        """How many manifests lie here, readable or not."""
        return len(self.steps())

    def rows(self) -> list[dict[str, JSON]]:
        """What `checkpoints list` prints, by step ascending. Unreadable manifests are left to `verify`."""
        return self.listing().rows

    def listing(self) -> Listing:
        """The same, with what else one look at the folder tells. Raises CorruptCheckpointError for bad pins."""
        index = read_index(self._store)
        infos, policy = self._infos(index), index.retention()
        kinds = derive_kinds(policy, infos, index.schedule or Schedule(1, 1))
        shares = shared_bytes(index.rows)
        rows = [self._row(index.rows[info.step], info, kinds[info.step], shares[info.step]) for info in infos]
        return Listing(rows, policy, len(index.damaged), freed_bytes(index.rows, index.rows))

    def show(self, at: str | int | Path) -> dict[str, JSON]:
        """What `checkpoints show` prints: the row, where the checkpoint comes from and why it was saved, its tensors.

        `note` is that of its pin, None where there is none; `record` is the caller's, less the configuration's text. A
        digest that was not known when several processes wrote the state is found by reading it.
        """
        manifest = self.manifest(at)
        row = next((row for row in self.rows() if row["step"] == manifest.step), {})
        return {
            **row,
            "state_digest": self._state_digest(manifest),
            "parent": manifest.record.get("parent"),
            "reasons": list(manifest.reasons),
            "note": load_pins(self._store.folder, self._store.files).get(manifest.step),
            "healthy": manifest.healthy,
            "health": dict(manifest.health),
            "samples_seen": manifest.samples_seen,
            "attempt": manifest.attempt,
            "world_size": manifest.world_size,
            "format_version": manifest.format_version,
            "policy": manifest.policy,
            "record": {name: value for name, value in manifest.record.items() if name not in ("config", "parent")},
            "packs": [{"name": pack.name, "bytes": pack.bytes} for pack in manifest.packs],
            "tensors": [
                {"name": name, "dtype": entry.dtype, "shape": list(entry.shape), "bytes": entry.num_bytes}
                for name, entry in sorted(manifest.tensors.items())
            ],
        }

    def resolve(self, at: str | int | Path) -> int:
        """The step that "latest", "best", a step, or a manifest's path means.

        Raises NoCheckpointError if there is none such, UsageError for any other word, and CorruptCheckpointError where
        the newest cannot be read: which other one serves instead is not for this to decide. Of the best, one that
        cannot be read is passed over, aloud.
        """
        if isinstance(at, Path) or (isinstance(at, str) and at.endswith(".json")):
            return self._resolve_path(Path(at))
        if isinstance(at, int) or (at.isascii() and at.isdecimal()):
            return self._known(int(at))
        if at not in ("latest", "best"):
            raise UsageError(f"checkpoint {at!r} is unknown, expected latest, best, a step, or a manifest's path")
        index = read_index(self._store)
        infos = self._infos(index)
        self._speak_of_unreadable(index, infos, at)
        found = rank_best(index.retention(), infos)[:1] if at == "best" else infos[-1:]
        if not found:
            raise no_checkpoint(self._store.folder, f"is {at}", self._store.steps())
        return found[0].step

    def _speak_of_unreadable(self, index: Index, infos: Sequence[CheckpointInfo], at: str) -> None:
        run, readable = self._store.folder.parent, [info.step for info in infos]
        to_see = f"to see what is damaged: dino-exp checkpoints verify {shlex.quote(str(run))}"
        newest = max(index.damaged, default=-1)
        if at == "latest" and newest > max(readable, default=-1):
            instead = f"; the newest that can be is {run}@{readable[-1]}" if readable else ""
            raise CorruptCheckpointError(
                f"{run}: the newest checkpoint, that of step {newest}, cannot be read "
                f"({index.damaged[newest]}){instead}; {to_see}"
            )
        if at == "best" and index.damaged:
            unread = listed(sorted(index.damaged))
            log.warning("%s: step %s cannot be read, so best means the best of the others; %s", run, unread, to_see)

    def manifest(self, at: str | int | Path = "latest") -> Manifest:
        """One checkpoint's manifest.

        Raises NoCheckpointError, CorruptCheckpointError, UnsupportedFormatError.
        """
        return self._store.read(self.resolve(at))[0]

    def state_digest(self, at: str | int | Path = "latest") -> str:
        """The digest of a checkpoint's state: recorded, or found by reading it. Raises as `manifest`, OSError."""
        return self._state_digest(self.manifest(at))

    def recorded_policy(self) -> KeepAny:
        """What the newest checkpoint records; no rules where there is none.

        Raises RefusedError for a policy that this version does not know.
        """
        return self._recorded(read_index(self._store))

    def plan_prune(self, rules: PruneRules) -> PrunePlan:
        """What `Ledger.prune` would do now. Changes nothing, also while the run is in use.

        Reads one checkpoint whole, the newest that is good, as `Ledger.prune` would. Raises RefusedError as
        `recorded_policy`, UsageError as `plan_prune`, CorruptCheckpointError for bad pins, OSError.
        """
        index = read_index(self._store)
        rows, damaged = sort_rows(self._store, index.rows, index.damaged)
        if any(self._store.identity(step) != index.rows[step].identity for step in damaged.keys() & index.rows.keys()):
            return self.plan_prune(rules)  # a training wrote one anew meanwhile
        verify_newest(self._store, rows, damaged, afresh=True)
        here = set(self._store.steps())  # a training may have dropped some meanwhile
        rows = {step: row for step, row in rows.items() if step in here}
        planned = plan_prune(
            rows,
            load_pins(self._store.folder, self._store.files),
            {step: why for step, why in damaged.items() if step in here},
            recorded=self._recorded(index),
            rules=rules,
            schedule=index.schedule or Schedule(1, 1),
        )
        thin = planned.plan.thin.items()
        gains = [thin_gain(self._store.read(step)[0], parts, without(rows, planned.plan.drop)) for step, parts in thin]
        return replace(planned, freed_bytes=planned.freed_bytes + sum(gains))

    def num_bytes(self, steps: Iterable[int] | None = None) -> int:
        """How many bytes the packs of some or all readable checkpoints hold: what `verify` has to read."""
        rows = read_index(self._store).rows
        chosen = [rows[step] for step in (rows if steps is None else steps) if step in rows]
        packs = {name: num for row in chosen for name, num in zip(row.packs, row.pack_bytes, strict=True)}
        return sum(packs.values())  # each pack once, however many checkpoints reach into it

    def verify(
        self, steps: Iterable[int] | None = None, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, JSON]:
        """Check every byte of some or all checkpoints: `{ok, checked, damaged: [{step, tensor, pack, reason}]}`.

        With all of them the pins are read too: damage there is of no step. What a training drops meanwhile is neither
        checked nor damaged. `progress(done, total)` hears of bytes read, out of those that the packs hold (0 where that
        cannot be told before). Memory is bounded.

        Raises NoCheckpointError for an unknown step; UnsupportedFormatError or OSError where something is of a newer
        version or cannot be read, once all the rest was found to be good. Beside damage it is one more place.
        """
        chosen = self._store.steps() if steps is None else [self._known(step) for step in steps]
        done, total, seen = 0, 0, Seen()
        with contextlib.suppress(OSError, UnsupportedFormatError):  # told below, with the step
            total = self.num_bytes(chosen)

        def count(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(done, total)

        damaged: list[dict[str, Any]] = []
        unread: dict[int, Exception] = {}
        num_checked = 0
        for step in chosen:
            try:
                num_checked += self._verify_step(step, count, seen, damaged)
            except (OSError, UnsupportedFormatError) as problem:
                unread[step] = problem
        damaged += self._verify_pins() if steps is None else []
        if unread and not damaged:
            raise next(iter(unread.values()))
        damaged += [_place(step, Damage(None, None, f"not checked: {problem}")) for step, problem in unread.items()]
        return {"ok": not damaged, "checked": num_checked, "damaged": damaged}

    def load_tensors(self, at: str | int | Path = "latest", prefix: str = "") -> dict[str, Tensor]:
        """Tensors whose names begin with `prefix`, on the CPU, each checked.

        Raises CorruptCheckpointError, OSError.
        """
        from dino_exp.checkpoint.tensors import load_tensor  # torch: only here

        def load(manifest: Manifest) -> dict[str, Tensor]:
            with PackReader(self._store.files, self._store.packs_folder, manifest.packs) as packs:
                wanted = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
                return {name: load_tensor(packs, entry, manifest.bases) for name, entry in sorted(wanted.items())}

        return self._as_it_stands(self.resolve(at), load)

    def restore(
        self,
        state: Stateful,
        at: str | int | Path = "latest",
        *,
        optional: tuple[str, ...] = (),
        writers: Writers | None = None,
    ) -> Manifest:
        """Load one checkpoint into `state` without changing anything on disk: how a fork takes over its parent's.

        `writers`: the processes whose states are to have it, where they are several. Every byte is checked before the
        state is touched. Raises CorruptCheckpointError, NoCheckpointError, CheckpointError if the state does not fit
        (names that begin with one of `optional` may be on one side only).
        """
        from dino_exp.checkpoint.restoring import Restored  # torch: only here and above
        from dino_exp.checkpoint.writers import OneWriter

        all_writers = OneWriter() if writers is None else writers

        def load(manifest: Manifest) -> Manifest:
            all_writers.load(state, manifest, self._store, optional)
            return manifest

        try:
            step = self.resolve(at)
            read_verified(self._store, step)
            manifest = self._as_it_stands(step, load)
        except BaseException as problem:
            all_writers.end_load(problem, None)
            raise
        all_writers.end_load(None, Restored(manifest, 0, ()))
        return manifest

    def _as_it_stands(self, step: int, load: Callable[[Manifest], Loaded]) -> Loaded:
        """What `load` makes of a step's manifest; again where a training wrote the checkpoint anew meanwhile."""
        manifest, identity = self._store.read(step)
        try:
            return load(manifest)
        except CorruptCheckpointError:
            if self._store.identity(step) in (None, identity):
                raise
        return self._as_it_stands(step, load)

    def _state_digest(self, manifest: Manifest) -> str:
        if manifest.state_digest is not None:
            return manifest.state_digest
        from dino_exp.checkpoint.assembly import read_state_digest  # numpy: only here

        return read_state_digest(manifest, self._store)

    def _infos(self, index: Index) -> list[CheckpointInfo]:
        pins = load_pins(self._store.folder, self._store.files)
        rows = sorted(index.rows.items())
        return [replace(row.info, pinned=True) if step in pins else row.info for step, row in rows]

    def _row(self, row: Row, info: CheckpointInfo, kinds: tuple[str, ...], shared: int) -> dict[str, JSON]:
        return {
            "step": info.step,
            "epoch": info.epoch,
            "kinds": list(kinds),
            "metrics": metrics_to_json(info.metrics),
            "bytes": info.bytes,
            "content_bytes": row.content_bytes,
            "shared_bytes": shared,
            "frees_bytes": max(info.bytes - shared, 0),
            "created_at": info.created_at,
            "config_hash": row.config_hash,
            "git_commit": row.git_commit,
            "code_id": row.code_id,
            "state_digest": row.state_digest,
            "resumable": info.resumable,
            "verified": info.verified,
        }

    def _known(self, step: int) -> int:
        steps = self._store.steps()
        if step not in steps:
            raise no_checkpoint(self._store.folder, f"of step {step}", steps)
        return step

    def _resolve_path(self, path: Path) -> int:
        step = parse_manifest_name(path.name)
        if step is None or path.parent.resolve() != self._store.folder.resolve():
            raise UsageError(
                f"{path} is not a manifest in {self._store.folder}, expected {self._store.manifest_path(0)}"
            )
        return self._known(step)

    def _recorded(self, index: Index) -> KeepAny:
        try:
            return KeepAny(()) if index.policy is None else retention_from_json(index.policy)
        except ConfigError as problem:
            raise RefusedError(
                f"{self._store.folder}: the newest checkpoint records a policy that this version does not know "
                f"({problem}), so it cannot say what may go; use the version that wrote it"
            ) from problem

    def _verify_step(
        self, step: int, progress: Callable[[int], None], seen: Seen, damaged: list[dict[str, Any]]
    ) -> bool:
        """Add its damaged places; False when a training dropped it meanwhile. Raises as `verify`."""
        try:
            manifest, identity = self._store.read(step)
        except FileNotFoundError:
            return False
        except CorruptCheckpointError as damage:
            damaged.append(_place(step, Damage(None, None, str(damage))))
            return True
        found: list[Damage] = []
        try:
            found.extend(find_damage(manifest, self._store.files, self._store.packs_folder, progress, seen))
        finally:
            anew = bool(found) and self._store.identity(step) != identity  # it is no longer what is committed
            damaged.extend([] if anew else [_place(step, damage) for damage in found])
        return self._verify_step(step, progress, Seen(), damaged) if anew else True

    def _verify_pins(self) -> list[dict[str, Any]]:
        try:
            load_pins(self._store.folder, self._store.files)
        except CorruptCheckpointError as damage:
            return [_place(None, Damage(None, None, str(damage)))]
        return []


def _place(step: int | None, damage: Damage) -> dict[str, Any]:
    return {"step": step, "tensor": damage.tensor, "pack": damage.pack, "reason": damage.reason}
