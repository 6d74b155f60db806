"""Writing committed checkpoints anew, so that they need certain packs no more. Nothing is committed here.

The content stays what it was, or the part of it that is to stay. What is stored in a way that still makes sense is
carried over as it is; the rest is decoded, and encoded so that it stands for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from dino_exp.checkpoint.assembly import read_state_digest
from dino_exp.checkpoint.bases import BaseList
from dino_exp.checkpoint.blocks import buffer_of, load_content
from dino_exp.checkpoint.codec_names import RAW
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.encoding import Encoder, Plain, order, packs_reached
from dino_exp.checkpoint.layout import PackName, pack_step, parse_pack_name
from dino_exp.checkpoint.manifest import FORMAT_VERSION, Chunk, Manifest, PackEntry, TensorEntry, chunks_of, closure
from dino_exp.checkpoint.pack import Key, PackReader, PackWriter, write_pack
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.verify import whole_state_digest

_Content: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...], str]  # dtype, offset, shape, digest


def _content(dtype: str, chunk: Chunk) -> _Content:
    return dtype, chunk.offset, chunk.shape, chunk.content_digest


@dataclass(frozen=True)
class _Part:
    """One chunk of a tensor that is to stay: the tensor's name, its own key, and where it was.

    `named`: it must lie under its own key, as in an ordinary safetensors file, and not refer to equal content.
    """

    tensor: str
    key: Key
    chunk: Chunk
    named: bool

    @property
    def content(self) -> _Content:
        """What it holds, and of which part of its tensor."""
        return _content(self.key.dtype, self.chunk)

    def order(self, storage: Storage) -> tuple[int, str, tuple[int, ...], bool]:
        """To sort by as the encoder wants it."""
        return order(self.tensor, self.key.dtype, self.chunk.offset, storage)


class Rewriter:
    """Rewrites some checkpoints of a folder, oldest first, without the packs in `doomed`, which grow on the way.

    What one of them has anew the later ones refer to. `wrote` hears of bytes written.
    """

    def __init__(
        self, store: Store, storage: Storage, doomed: Collection[str], wrote: Callable[[int], None] | None = None
    ) -> None:
        alone = "raw" if storage.codec == "raw" else "zstd"
        self._store, self._storage, self._wrote = store, replace(storage, codec=alone, threads=0), wrote
        self.doomed = set(doomed)
        self.written: set[str] = set()  # by the last call: packs that nothing else can need yet
        self._anew: dict[_Content, tuple[Chunk, Sequence[Chunk]]] = {}
        self._packs: dict[str, PackEntry] = {}

    def rewrite(self, manifest: Manifest, prefixes: tuple[str, ...] = ("",)) -> Manifest:
        """The manifest of the same checkpoint, of the tensors whose names begin with one of `prefixes`.

        A synced pack holds what it has anew; none is made where it only refers to others from now on.
        Raises CorruptCheckpointError, OSError.
        """
        parts = sorted(_parts(manifest, prefixes), key=lambda part: part.order(self._storage))
        bases = BaseList()
        if any(self._refer(part, manifest, BaseList()) is None for part in parts):
            own = (pack.name for pack in manifest.packs if pack_step(pack.name) == manifest.step)
            self.doomed |= {*own}  # or a part of it would stay for the sake of what need not be decoded
        chunks: dict[int, Chunk] = {}
        with PackReader(self._store.files, self._store.packs_folder, manifest.packs) as packs:
            fill = partial(self._fill, manifest=manifest, packs=packs, parts=parts, bases=bases, chunks=chunks)
            written = write_pack(self._store, self._new_name(manifest), [part.key for part in parts], fill, self._wrote)
        self.written = {pack.name for pack in written}
        self._packs |= {pack.name: pack for pack in (*manifest.packs, *written)}
        made = self._describe(manifest, parts, chunks, bases)
        self._anew |= {part.content: (chunks[at], made.bases) for at, part in enumerate(parts)}
        return made

    def take_back(self) -> None:
        """The last checkpoint was not put in place: nothing may refer to what was written for it. Raises OSError."""
        self._anew = {content: known for content, known in self._anew.items() if known[0].pack not in self.written}
        self._store.remove_packs(self.written)

    def _fill(
        self,
        pack: PackWriter,
        manifest: Manifest,
        packs: PackReader,
        parts: Sequence[_Part],
        bases: BaseList,
        chunks: dict[int, Chunk],
    ) -> None:
        encoder = Encoder(self._storage, bases=bases)
        for at, part in enumerate(parts):
            found = self._refer(part, manifest, bases) or self._carry(part, manifest, packs, pack, bases)
            if found is None:
                content = buffer_of(part.chunk, part.key.dtype)
                load_content(packs, part.chunk, manifest.bases, part.key.dtype, content)
                encoder.write(pack, iter([Plain(part.tensor, part.key, content, part.chunk.offset)]))
                found = encoder.chunks[part.key.name]
            chunks[at] = found
            self._anew[part.content] = (chunks[at], bases.chunks)

    def _refer(self, part: _Part, manifest: Manifest, bases: BaseList) -> Chunk | None:
        """The same content where it may stay, with bases that may stay; None where there is none such."""
        dtype, chunk = part.key.dtype, part.chunk
        found: dict[Chunk, Chunk | None] = {}
        for each in (*(manifest.bases[place] for place in closure(chunk, manifest.bases)), chunk):
            anew = None if part.named else self._anew.get(_content(dtype, each))
            below = [found[manifest.bases[place]] for place in each.bases]
            if anew is not None:
                found[each] = bases.adopt(*anew)
            elif each.pack in self.doomed or None in below:
                found[each] = None
            else:
                found[each] = replace(each, bases=tuple(bases.place(base) for base in below if base is not None))
        return found[chunk]

    def _carry(
        self, part: _Part, manifest: Manifest, packs: PackReader, pack: PackWriter, bases: BaseList
    ) -> Chunk | None:
        """The stored bytes in the new pack; None where they make no sense without a base that must go."""
        own = replace(part.chunk, pack="")  # as if it lay in no pack: only its bases decide
        chunk = self._refer(replace(part, chunk=own), manifest, bases)
        if chunk is None:
            return None
        stored = memoryview(bytearray(chunk.stored_bytes))
        packs.read_stored(part.chunk, stored)
        plain = chunk.codec == RAW and pack.num_data_bytes % DTYPES[part.key.dtype].item_bytes == 0
        start, _, _ = pack.add(part.key, [stored]) if plain else pack.add_bytes(part.key.name, [stored])
        return replace(chunk, pack=pack.name, key=part.key.name, start=start)

    def _new_name(self, manifest: Manifest) -> PackName:
        found = map(parse_pack_name, self._store.packs_of_step(manifest.step))
        names = [name for name in found if name is not None]
        generation = 1 + max((name.generation for name in names), default=0)
        return PackName(manifest.step, manifest.attempt, 0, generation)

    def _describe(
        self, manifest: Manifest, parts: Sequence[_Part], chunks: dict[int, Chunk], bases: BaseList
    ) -> Manifest:
        tensors: dict[str, TensorEntry] = {}
        for at, part in enumerate(parts):
            before = tensors[part.tensor].chunks if part.tensor in tensors else ()
            tensors[part.tensor] = replace(manifest.tensors[part.tensor], chunks=(*before, chunks[at]))
        reached = packs_reached(tensors, bases.chunks)
        made = replace(
            manifest,
            tensors=tensors,
            bases=tuple(bases.chunks),
            content_bytes=sum(entry.num_bytes for entry in tensors.values()),
            packs=tuple(self._packs[name] for name in sorted(reached)),
            format_version=FORMAT_VERSION,
        )
        if len(tensors) == len(manifest.tensors):
            return made
        full = manifest.full_state_digest or read_state_digest(manifest, self._store)
        return replace(made, resumable=False, state_digest=whole_state_digest(made), full_state_digest=full)


def _parts(manifest: Manifest, prefixes: tuple[str, ...]) -> Iterator[_Part]:
    named = all(chunk.codec == RAW for _, _, chunk in chunks_of(manifest))
    for name, entry in manifest.tensors.items():
        if name.startswith(prefixes):
            for at, chunk in enumerate(entry.chunks):
                text = name if len(entry.chunks) == 1 else f"{name}#{at}"
                yield _Part(name, Key(text, entry.dtype, chunk.shape), chunk, named)


def check_content(manifest: Manifest, store: Store, packs: Collection[str]) -> None:
    """Decode every tensor that lies encoded in one of `packs` and compare it with its digest.

    Raises CorruptCheckpointError, OSError.
    """
    with PackReader(store.files, store.packs_folder, manifest.packs) as reader:
        for entry in manifest.tensors.values():
            for chunk in entry.chunks:
                if chunk.pack in packs and chunk.codec != RAW:
                    load_content(reader, chunk, manifest.bases, entry.dtype, buffer_of(chunk, entry.dtype))
