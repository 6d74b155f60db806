"""From a checkpoint to the bytes of an export: which tensors, under which names, with which facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.weights.architecture import ARCHITECTURE, Architecture
from dino_exp.weights.formats import (
    Format,
    hub_files,
    metadata_of,
    official_checkpoint,
    safetensors_bytes,
    torch_bytes,
)
from dino_exp.weights.names import PARTS, Part
from dino_exp.weights.placing import place_file, place_folder
from dino_exp.weights.source import BACKBONE, CENTER, CheckpointWeights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Export:
    """What goes onto the disk: `content` is one file, or the files of a folder by name."""

    form: Format
    parts: tuple[str, ...]
    architecture: Architecture
    facts: Mapping[str, Any]
    num_tensors: int
    content: bytes | Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of all its files."""
        return len(self.content) if isinstance(self.content, bytes) else sum(map(len, self.content.values()))

    def place(self, path: Path, *, force: bool) -> None:
        """Write it durably. Raises as `placing` does."""
        if isinstance(self.content, bytes):
            place_file(path, self.content, force=force, form=self.form)
        else:
            place_folder(path, self.content, force=force)


def make_export(weights: CheckpointWeights, form: Format, part: Part | None) -> Export:
    """Read what the format needs of a checkpoint. `part` None: the teacher; for `pth` both, as far as they are there.

    Raises NoCheckpointError where it holds no such part, CorruptCheckpointError, OSError.
    """
    return _official(weights, part) if form == "pth" else _backbone(weights, form, part or "teacher")


def _backbone(weights: CheckpointWeights, form: Format, part: Part) -> Export:
    architecture, facts = weights.architecture(part), weights.facts()
    tensors = weights.tensors(f"{part}.{BACKBONE}")
    metadata = metadata_of(facts, part, architecture)
    content: bytes | dict[str, bytes]
    if form == "hf":
        content = hub_files(tensors, metadata, architecture, weights.settings)
    else:
        content = safetensors_bytes(tensors, metadata)
    return Export(
        form=form, parts=(part,), architecture=architecture, facts=facts, num_tensors=len(tensors), content=content
    )


def _official(weights: CheckpointWeights, part: Part | None) -> Export:
    held = [name for name in PARTS if weights.holds(name)]
    parts = [part] if part is not None else held or ["teacher"]  # of a checkpoint without either, `require` tells
    architecture, facts = weights.architecture(parts[0]), weights.facts()
    models: dict[str, dict[str, Tensor]] = {}
    for name in parts:
        weights.require(name)
        models[name] = weights.tensors(f"{name}.")
    center_1K = weights.tensors(CENTER).get("")
    said = {**facts, ARCHITECTURE: architecture.as_json()}
    made = official_checkpoint(models, center_1K, weights.manifest.epoch, said)
    return Export(
        form="pth",
        parts=tuple(parts),
        architecture=architecture,
        facts=facts,
        num_tensors=sum(map(len, models.values())),
        content=torch_bytes(made),
    )
