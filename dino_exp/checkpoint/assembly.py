"""The digest of a state whose tensors were written in pieces: found by reading them."""

from __future__ import annotations

import numpy as np

from dino_exp.checkpoint.arrays import load_words
from dino_exp.checkpoint.digests import content_digest, state_digest
from dino_exp.checkpoint.manifest import Manifest, TensorEntry
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.store import Store


def read_state_digest(manifest: Manifest, store: Store) -> str:
    """The digest of a checkpoint's state: as recorded, or else from what its packs hold, one tensor at a time.

    Equal states have equal digests, however many processes wrote them and under whatever sharding.
    Raises CorruptCheckpointError, UnsupportedFormatError, OSError.
    """
    if manifest.state_digest is not None:
        return manifest.state_digest
    with PackReader(store.files, store.packs_folder, manifest.packs) as packs:
        rows = [
            (name, entry.dtype, entry.shape, _content_digest(packs, entry, manifest))
            for name, entry in manifest.tensors.items()
        ]
    return state_digest(rows, manifest.state)


def _content_digest(packs: PackReader, entry: TensorEntry, manifest: Manifest) -> str:
    if len(entry.chunks) == 1:
        return entry.chunks[0].content_digest
    whole = load_words(packs, entry, manifest.bases)
    return content_digest(whole.reshape(-1).view(np.uint8).data)
