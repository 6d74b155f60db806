"""From a manifest back into a live state, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.tensors import SavedState
from dino_exp.checkpoint.types import Stateful
from dino_exp.checkpoint.verify import few
from dino_exp.errors import CheckpointError, NoCheckpointError


@dataclass(frozen=True)
class Restored:
    """What was loaded, how many steps were lost to damage, and which steps went to quarantine."""

    manifest: Manifest
    lost_steps: int
    quarantined: tuple[int, ...]


def load_into(state: Stateful, manifest: Manifest, store: Store, optional: tuple[str, ...]) -> None:
    """Hand a checkpoint to a live state, tensor by tensor, each checked again as it is read.

    Raises CheckpointError when names, shapes or types differ, and then nothing was touched;
    CorruptCheckpointError.
    """
    check_fit(manifest, state.state_dict(), optional)
    with PackReader(store.files, store.packs_folder, manifest.packs) as packs:
        state.load_state_dict(SavedState(manifest, packs))


def check_fit(manifest: Manifest, live: Mapping[str, Any], optional: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError unless the live state has the same names, shapes and types.

    Names that begin with one of `optional` may be on one side only: an optimizer has no moments before its
    first step.
    """
    saved = {*manifest.tensors, *manifest.state}
    if manifest.full_state_digest is not None and any(isinstance(live[name], Tensor) for name in live.keys() - saved):
        parts = sorted({name.partition(".")[0] for name in manifest.tensors})
        raise CheckpointError(
            f"only a part of the checkpoint of step {manifest.step} was kept: {', '.join(parts)}. It can be evaluated "
            "and exported; a training goes on from one that `dino-exp checkpoints list` shows as whole"
        )
    problems = [
        f"{what} {few(sorted(names))}"
        for what, found in (
            ("missing in it:", live.keys() - saved),
            ("unexpected in it:", saved - live.keys()),
        )
        if (names := [name for name in found if not name.startswith(optional)])
    ]
    differing = [text for name in sorted(saved & live.keys()) if (text := _difference(manifest, name, live[name]))]
    problems += [f"different: {few(differing)}"] * bool(differing)
    if problems:
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} does not fit the model: {'; '.join(problems)}. "
            "Build the model with the settings that the checkpoint records (dino-exp checkpoints show)"
        )


def _difference(manifest: Manifest, name: str, live: Any) -> str | None:
    entry = manifest.tensors.get(name)
    if not isinstance(live, Tensor):
        return None if entry is None else f"{name} is a tensor in the checkpoint only"
    if entry is None:
        return f"{name} is no tensor in the checkpoint"
    found = (str(live.dtype).removeprefix("torch."), tuple(live.shape))
    expected = (entry.dtype, entry.shape)
    return (
        None if found == expected else f"{name} is {found[0]}{list(found[1])}, saved {expected[0]}{list(expected[1])}"
    )


def too_much_lost(
    store: Store, damaged: Mapping[int, str], step: int, lost_steps: int, allowed_steps: int
) -> NoCheckpointError:
    """The error when the next older good checkpoint is too old."""
    return NoCheckpointError(
        f"{store.folder}: {_list_damage(damaged)}. The next older good checkpoint is step {step}: "
        f"{lost_steps} steps would be lost, {allowed_steps} are allowed. To accept that: "
        f"checkpoint.restore.max_lost_steps={lost_steps}"
    )


def nothing_to_load(
    store: Store, at: str | int, damaged: Mapping[int, str], others: Iterable[int]
) -> NoCheckpointError:
    """The error when no wanted checkpoint is good."""
    known = ", ".join(map(str, others)) or "none"
    return NoCheckpointError(
        f"{store.folder}: {_list_damage(damaged) or f'no checkpoint {at!r}'}. Other steps here: {known}. "
        "To see what is damaged: dino-exp checkpoints verify <run>"
    )


def _list_damage(damaged: Mapping[int, str]) -> str:
    return "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
