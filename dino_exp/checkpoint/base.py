"""The committed checkpoint that a new one may be written against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType

from dino_exp.checkpoint.blocks import read_blocks
from dino_exp.checkpoint.dtypes import DTYPES
from dino_exp.checkpoint.manifest import Chunk, Manifest, chunks_of
from dino_exp.checkpoint.pack import PackReader
from dino_exp.checkpoint.planes import Words
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import CheckpointError, CorruptCheckpointError

Content = tuple[str, tuple[int, ...], tuple[int, ...], str]  # dtype, offset, shape, digest: equal parts of tensors
Box = tuple[str, str, tuple[int, ...], tuple[int, ...]]  # name of the tensor, dtype, offset, shape


class UnusableBaseError(CheckpointError):
    """A checkpoint cannot be read that another one was to be written against: write that one without it."""

    def __init__(self, step: int, reason: str, *, is_damage: bool) -> None:
        super().__init__(f"step {step} cannot be read: {reason}")
        self.step, self.reason, self.is_damage = step, reason, is_damage


class Base:
    """Reads a checkpoint's tensors as blocks. For a `with`: its packs stay open meanwhile."""

    def __init__(self, manifest: Manifest, store: Store) -> None:
        self.manifest = manifest
        self._packs = PackReader(store.files, store.packs_folder, manifest.packs)
        self._by_box: dict[Box, Chunk] = {}
        self._by_content: dict[Content, Chunk] = {}
        for name, entry, chunk in chunks_of(manifest):
            self._by_box[name, entry.dtype, chunk.offset, chunk.shape] = chunk
            self._by_content[entry.dtype, chunk.offset, chunk.shape, chunk.content_digest] = chunk

    def chunk(self, box: Box) -> Chunk | None:
        """Where it has just this part of a tensor."""
        return self._by_box.get(box)

    def same(self, content: Content) -> Chunk | None:
        """Where it has exactly this content, of whatever tensor the same part."""
        return self._by_content.get(content)

    def read(self, wanted: Sequence[Chunk], dtype: str) -> Iterator[list[Words]]:
        """See `read_blocks`. Raises UnusableBaseError whatever is wrong with it."""
        blocks = read_blocks(self._packs, wanted, self.manifest.bases, dtype, DTYPES[dtype].item_bytes)
        try:
            yield from blocks
        except (CorruptCheckpointError, UnsupportedFormatError) as problem:
            raise UnusableBaseError(self.manifest.step, str(problem), is_damage=True) from problem
        except OSError as problem:  # it may pass, and says nothing about the bytes
            raise UnusableBaseError(self.manifest.step, str(problem), is_damage=False) from problem

    def __enter__(self) -> Base:
        self._packs.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packs.__exit__(kind, error, trace)
