"""Checkpoints of which only a part was kept (thinned): no training goes on from one, whoever asks for it."""

from __future__ import annotations

from collections.abc import Sequence

from dino_exp.checkpoint.absent import to_see
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import NoCheckpointError


def whole_steps(reader: CheckpointReader) -> list[int]:
    """The steps whose checkpoint is whole, ascending. Raises CorruptCheckpointError for bad pins."""
    return [info.step for info in reader.infos() if info.resumable]


def nearest(steps: Sequence[int], step: int) -> list[int]:
    """Of ascending steps the last before `step` and the first after it, as far as there are such."""
    return [*[one for one in steps if one < step][-1:], *[one for one in steps if one > step][:1]]


def check_whole(reader: CheckpointReader, manifest: Manifest, asked: str) -> None:
    """Raise NoCheckpointError, with the nearest whole steps, where nothing can go on from the checkpoint `asked`."""
    if manifest.resumable:
        return
    parts = ", ".join(sorted({name.partition(".")[0] for name in manifest.tensors})) or "no tensors"
    near = nearest(whole_steps(reader), manifest.step)
    what = f"the nearest whole ones are of step {' and step '.join(map(str, near))}" if near else "no whole one is left"
    raise NoCheckpointError(
        f"{asked}: only a part of the checkpoint of step {manifest.step} was kept ({parts}), so no training can go on "
        f"from it; {what}. {to_see(reader.folder)}"
    )
