"""From the tensors of a state to the chunks of a pack, with whichever codec pays for each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import TypeAlias

from dino_exp.checkpoint.base import Base, Content
from dino_exp.checkpoint.bases import BaseList
from dino_exp.checkpoint.blocks import BLOCK_BYTES, encode_block, words_of
from dino_exp.checkpoint.choosing import Choice, choose
from dino_exp.checkpoint.codec_names import DELTA, RAW, ZSTD
from dino_exp.checkpoint.digests import content_digest
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.manifest import Chunk, TensorEntry
from dino_exp.checkpoint.pack import Key, PackWriter
from dino_exp.checkpoint.planes import Words
from dino_exp.checkpoint.storage import Storage

_LEAST_GAIN = 0.02  # of the raw bytes: less is not worth another chunk that must be good and be read
_SMALL_BYTES = 1024  # below, a block's head costs more than it saves

Buffers: TypeAlias = list[bytes | memoryview]


@dataclass(frozen=True)
class Plain:
    """A box of the tensor `name`, all of it or not, as it is: its key in the pack and its row-major bytes."""

    name: str
    key: Key
    content: memoryview
    offset: tuple[int, ...]

    @property
    def box(self) -> tuple[str, str, tuple[int, ...], tuple[int, ...]]:
        """Of which tensor it is which part: the same in another checkpoint may be much like it."""
        return self.name, self.key.dtype, self.offset, self.key.shape

    def block(self, at: int) -> Words:
        """The block of its content that begins at a byte."""
        return words_of(self.content[at : at + BLOCK_BYTES], DTYPES[self.key.dtype].item_bytes)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Plan:
    """What becomes of one tensor.

    `twin` has the same content in this checkpoint; `old` is where the base has it. Otherwise it is encoded against
    `sources`: chunks of the base, or keys of this pack. `digest` is empty where the pack finds it out.
    """

    tensor: Plain
    digest: str = ""
    codec: str = RAW
    twin: str | None = None
    old: Chunk | None = None
    sources: tuple[Chunk | str, ...] = ()


class Encoder:
    """Writes tensors into one pack, and knows afterwards by their keys in `chunks` where they are.

    Without a `base` the checkpoint is self-contained. Raises UnusableBaseError where that cannot be read, OSError.
    """

    def __init__(
        self, storage: Storage, base: Base | None = None, pool: Executor | None = None, bases: BaseList | None = None
    ) -> None:
        self._storage, self._base, self._pool = storage, base, pool
        self._planned: dict[Content, str] = {}
        self._companion: Plain | None = None
        self.chunks: dict[str, Chunk] = {}
        self.bases = BaseList() if bases is None else bases

    def write(self, pack: PackWriter, tensors: Iterator[Plain]) -> None:
        """Add all of them. A companion comes just before what resembles it: see `order`."""
        blocks = _ahead(self._blocks(tensors), 0 if self._pool is None else self._storage.threads + 1)
        for plan, parts in groupby(blocks, key=lambda block: block[0]):
            pieces = (block.result() for _, block in parts if block is not None)
            self.chunks[plan.tensor.key.name] = self._place(plan, pack, chain.from_iterable(pieces))

    def _blocks(self, tensors: Iterator[Plain]) -> Iterator[tuple[_Plan, _Block | None]]:
        """Encoded blocks of one tensor after the other; None for one that needs none."""
        for tensor in tensors:
            if self._storage.codec == "raw":
                yield _Plan(tensor=tensor), _Done([tensor.content])
                continue
            digest = content_digest(tensor.content)
            if self._storage.is_companion(tensor.name):
                self._companion = tensor
            content = (tensor.key.dtype, tensor.offset, tensor.key.shape, digest)
            old = None if self._base is None else self._base.same(content)
            if content in self._planned:
                yield _Plan(tensor=tensor, twin=self._planned[content]), None
            elif old is not None:
                yield _Plan(tensor=tensor, old=old), None
            elif len(tensor.content) < _SMALL_BYTES:
                yield _Plan(tensor=tensor, digest=digest), _Done([tensor.content])
            else:
                yield from self._encoded(tensor, digest)
            self._planned.setdefault(content, tensor.key.name)

    def _encoded(self, tensor: Plain, digest: str) -> Iterator[tuple[_Plan, _Block]]:
        dtype, (sources, sets) = tensor.key.dtype, self._sources(tensor)
        blocks = self._read(tensor, sources)
        words, others = next(blocks)
        alone = choose(words, (), dtype, ())
        best = choose(words, others, dtype, sets) if sets else alone
        if best.share > alone.share - _LEAST_GAIN:
            best = alone
        used = tuple(sources[place] for place in best.needs)
        codec = DELTA if used else ZSTD if best.share < 1 - _LEAST_GAIN else RAW
        plan = _Plan(tensor=tensor, digest=digest, codec=codec, sources=used)
        if codec == RAW:
            yield plan, _Done([tensor.content])
            return
        within = [tuple(map(best.needs.index, needs)) for needs in sets if set(needs) <= set(best.needs)]
        choice: Choice | None = replace(best, needs=tuple(range(len(used))))
        blocks = chain([(words, others)], blocks) if used == tuple(sources) else self._read(tensor, used)
        for words, others in blocks:
            yield plan, self._start(words, others, dtype, within, choice)
            choice = None if used else choice  # what has no base has no choice

    def _sources(self, tensor: Plain) -> tuple[list[Chunk | str], list[tuple[int, ...]]]:
        """What may say something about a tensor, and which of that together."""
        _, dtype, offset, shape = tensor.box
        near = self._companion
        before = None if self._base is None else self._base.chunk(tensor.box)
        if near is None or near.box != (self._storage.companion_of(tensor.name), dtype, offset, shape):
            return ([], []) if before is None else ([before], [(0,)])
        if self._base is None or before is None:
            return [near.key.name], [(0,)]
        near_before = self._base.chunk(near.box)
        if near_before is None:
            return [before, near.key.name], [(0,), (1,)]
        return [before, near.key.name, near_before], [(0,), (1,), (0, 1, 2)]

    def _read(self, tensor: Plain, sources: Sequence[Chunk | str]) -> Iterator[tuple[Words, list[Words]]]:
        """The blocks of a tensor, each with the same block of its sources."""
        stored = [source for source in sources if isinstance(source, Chunk)]
        near = [] if self._companion is None else [self._companion]
        theirs = self._base.read(stored, tensor.key.dtype) if self._base is not None and stored else None
        for at in range(0, len(tensor.content), BLOCK_BYTES):
            read = iter(() if theirs is None else next(theirs))
            yield (
                tensor.block(at),
                [next(read) if isinstance(source, Chunk) else near[0].block(at) for source in sources],
            )
        if theirs is not None:
            next(theirs, None)  # to its end, where its digests are checked

    def _start(
        self, words: Words, others: list[Words], dtype: str, sets: Sequence[tuple[int, ...]], choice: Choice | None
    ) -> _Block:
        def encode() -> Buffers:
            return encode_block(words, others, choice or choose(words, others, dtype, sets))

        return _Done(encode()) if self._pool is None else self._pool.submit(encode)

    def _place(self, plan: _Plan, pack: PackWriter, pieces: Iterator[bytes | memoryview]) -> Chunk:
        """Write a tensor's blocks, or find where it is already."""
        if plan.twin is not None:
            return self.chunks[plan.twin]
        if plan.old is not None:
            return self._adopt(plan.old)
        key, bases = plan.tensor.key, tuple(map(self._place_of, plan.sources))
        raw = self._storage.codec == "raw"
        start, num_bytes, digest = pack.add(key, pieces) if raw else pack.add_bytes(key.name, pieces)
        return Chunk(
            offset=plan.tensor.offset,
            shape=key.shape,
            pack=pack.name,
            key=key.name,
            start=start,
            stored_bytes=num_bytes,
            codec=plan.codec,
            stored_digest=digest,
            content_digest=plan.digest or digest,
            bases=bases,
        )

    def _place_of(self, source: Chunk | str) -> int:
        return self.bases.place(self.chunks[source] if isinstance(source, str) else self._adopt(source))

    def _adopt(self, old: Chunk) -> Chunk:
        assert self._base is not None
        return self.bases.adopt(old, self._base.manifest.bases)


class _Done:
    """A block that is encoded already, seen as the future of one."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def result(self) -> Buffers:
        return self._buffers


_Block: TypeAlias = _Done | Future[Buffers]


def _ahead(blocks: Iterator[tuple[_Plan, _Block | None]], num: int) -> Iterator[tuple[_Plan, _Block | None]]:
    """The same, begun `num` before they are wanted."""
    begun: deque[tuple[_Plan, _Block | None]] = deque()
    for block in blocks:
        begun.append(block)
        if len(begun) > num:
            yield begun.popleft()
    yield from begun


def order(name: str, dtype: str, offset: tuple[int, ...], storage: Storage) -> tuple[int, str, tuple[int, ...], bool]:
    """To sort by: falling element size, which aligns them; then by name, and what resembles another just after it."""
    companion = None if storage.codec == "raw" else storage.companion_of(name)
    return -DTYPES[dtype].item_bytes, companion or name, offset, companion is not None


def packs_reached(entries: Mapping[str, TensorEntry], bases: Sequence[Chunk]) -> set[str]:
    """The packs that tensors are read from."""
    return {chunk.pack for entry in entries.values() for chunk in entry.chunks} | {chunk.pack for chunk in bases}
