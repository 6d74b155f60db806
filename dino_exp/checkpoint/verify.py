"""Checking every byte that a manifest names, in bounded memory and without torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from dino_exp.checkpoint.codec_names import check_codec
from dino_exp.checkpoint.digests import state_digest
from dino_exp.checkpoint.manifest import Manifest, chunks_of, closure
from dino_exp.checkpoint.pack import BLOCK_BYTES, PackReader
from dino_exp.checkpoint.store import Store
from dino_exp.errors import CorruptCheckpointError
from dino_exp.fsio import Files

_MOST_NAMED = 8

Seen: TypeAlias = dict[tuple[str, int, int, str], str | None]  # what is wrong with the bytes at a place of a pack


@dataclass(frozen=True)
class Damage:
    """One damaged place: a tensor, or a whole pack or manifest when `tensor` is None."""

    tensor: str | None
    pack: str | None
    reason: str


def find_damage(
    manifest: Manifest,
    files: Files,
    packs_folder: Path,
    progress: Callable[[int], None] | None = None,
    seen: Seen | None = None,
    elsewhere: Collection[str] = (),
) -> Iterator[Damage]:
    """Each damaged pack and tensor, as it is found: also a tensor that builds on a damaged one.

    Packs in `elsewhere` are not read: another process looks at them.

    Each chunk is read once, and not at all if `seen`, which is added to, knows it from another checkpoint. `progress`
    hears of bytes read.

    Raises OSError when reading fails in a way that says nothing about the bytes (EIO, EACCES), and
    UnsupportedFormatError for a codec that this version does not know.
    """
    buffer, known = memoryview(bytearray(BLOCK_BYTES)), {} if seen is None else seen
    if manifest.state_digest not in (None, whole_state_digest(manifest)):
        yield Damage(None, None, "the digest of the state does not fit the tensors and JSON that it covers")
    with PackReader(files, packs_folder, manifest.packs) as packs:
        for pack in [pack for pack in manifest.packs if pack.name not in elsewhere]:
            problem = _problem(partial(packs.check_header, pack.name))
            if problem is not None:
                yield Damage(None, pack.name, problem)
        for name, _, chunk in chunks_of(manifest):
            for part in (*(manifest.bases[place] for place in closure(chunk, manifest.bases)), chunk):
                if part.pack in elsewhere:
                    continue
                place = (part.pack, part.start, part.stored_bytes, part.stored_digest)
                if place not in known:
                    check_codec(part.codec)
                    known[place] = _problem(partial(packs.check_stored, part, buffer))
                    if progress is not None:
                        progress(part.stored_bytes)
                problem = known[place]
                if problem is not None:  # one place of a tensor is enough
                    yield Damage(name, part.pack, problem)
                    break


def read_verified(store: Store, step: int) -> Manifest:
    """A step's manifest, after every byte that it names was checked.

    Raises CorruptCheckpointError, OSError.
    """
    try:
        manifest, identity = store.read(step)
    except FileNotFoundError as problem:
        raise CorruptCheckpointError(f"the manifest of step {step} is gone") from problem
    try:
        check_packs(manifest, store)
    except CorruptCheckpointError:
        if store.identity(step) in (None, identity):
            raise
        return read_verified(store, step)  # it was written anew meanwhile
    return manifest


def check_packs(manifest: Manifest, store: Store, elsewhere: Collection[str] = ()) -> None:
    """Read every byte that a manifest names, but for those packs. Raises CorruptCheckpointError, OSError."""
    damages = list(find_damage(manifest, store.files, store.packs_folder, elsewhere=elsewhere))
    if damages:
        places = few(damage.tensor or damage.pack or "manifest" for damage in damages)
        raise CorruptCheckpointError(f"step {manifest.step} is damaged in {places}: {damages[0].reason}")


def few(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    given = list(dict.fromkeys(names))
    return ", ".join(given[:_MOST_NAMED]) + (
        f" and {len(given) - _MOST_NAMED} more" if len(given) > _MOST_NAMED else ""
    )


def whole_state_digest(manifest: Manifest) -> str | None:
    """The digest of the state from the manifest alone; None where a tensor was written in pieces."""
    if any(len(entry.chunks) != 1 for entry in manifest.tensors.values()):
        return None
    rows = (
        (name, entry.dtype, entry.shape, entry.chunks[0].content_digest) for name, entry in manifest.tensors.items()
    )
    return state_digest(rows, manifest.state)


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except CorruptCheckpointError as damage:
        return str(damage)
    return None
