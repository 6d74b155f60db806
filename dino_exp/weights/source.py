"""Weights out of a run's checkpoint, with the facts that name where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.store import Store
from dino_exp.errors import CorruptCheckpointError, NoCheckpointError
from dino_exp.fsio import parse_json
from dino_exp.runs.named import Named
from dino_exp.weights.architecture import Architecture, architecture_of
from dino_exp.weights.names import PARTS

if TYPE_CHECKING:
    from torch import Tensor

BACKBONE = "backbone."
CENTER = "loss.center"


@dataclass(frozen=True)
class CheckpointWeights:
    """One checkpoint as a source of weights; `where` names it in messages."""

    reader: CheckpointReader
    store: Store
    manifest: Manifest
    where: str

    def holds(self, part: str) -> bool:
        """Whether the backbone of the teacher or of the student is in it."""
        return any(name.startswith(f"{part}.{BACKBONE}") for name in self.manifest.tensors)

    def require(self, part: str) -> None:
        """Raise NoCheckpointError, with what there is instead, unless it holds that part."""
        if self.holds(part):
            return
        there = [name for name in PARTS if self.holds(name)]
        if not there:
            raise NoCheckpointError(f"{self.where}: holds no backbone; did another program write it?")
        raise NoCheckpointError(
            f"{self.where}: holds no {part}, only the {there[0]}: it was thinned to what evaluation needs. "
            f"Ask for the {there[0]}, or for a checkpoint that can be resumed (dino-exp checkpoints list)"
        )

    @cached_property
    def settings(self) -> Any:
        """The identity settings that it records. Raises CorruptCheckpointError where it records none."""
        text = self.manifest.record.get("config")
        if not isinstance(text, str):
            raise CorruptCheckpointError(f"{self.where}: does not say which settings made it, so its model is unknown")
        return parse_json(text.encode("utf-8", "replace"), self.where, max_depth=16, error=CorruptCheckpointError)

    def architecture(self, part: str) -> Architecture:
        """The backbone of one part. Raises as `require` and `architecture_of` do."""
        self.require(part)
        prefix = f"{part}.{BACKBONE}"
        shapes = {
            name.removeprefix(prefix): entry.shape
            for name, entry in self.manifest.tensors.items()
            if name.startswith(prefix)
        }
        return architecture_of(self.settings, shapes, self.where)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Its tensors whose names begin with `prefix`, without it, on the CPU, each checked.

        Raises CorruptCheckpointError, OSError.
        """
        step = self.manifest.step
        before = self.store.identity(step)
        try:
            found = self.reader.load_tensors(step, prefix)
        except (CorruptCheckpointError, FileNotFoundError):
            if self.store.identity(step) in (before, None):
                raise
            found = self.reader.load_tensors(step, prefix)  # the same state was written anew meanwhile, in other packs
        return {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def facts(self) -> dict[str, Any]:
        """Where it comes from: run key, step, epoch, hashes, commit, code and the digest of the whole state."""
        record: Mapping[str, Any] = self.manifest.record
        named = ("run_key", "config_hash", "group_hash", "code_id", "git_commit", "git_dirty", "data_fingerprint")
        return {
            **{name: record.get(name) for name in named},
            "step": self.manifest.step,
            "epoch": self.manifest.epoch,
            "state_digest": self.reader.state_digest(self.manifest.step),
        }


def open_checkpoint(wanted: Named) -> CheckpointWeights:
    """The checkpoint that somebody named, the latest where it was not said.

    Raises NoCheckpointError, UsageError, CorruptCheckpointError.
    """
    reader = wanted.reader
    manifest = reader.manifest(wanted.at or "latest")
    where = f"{wanted.paths.directory}@{manifest.step}"
    return CheckpointWeights(reader, Store(wanted.paths.checkpoints), manifest, where)
