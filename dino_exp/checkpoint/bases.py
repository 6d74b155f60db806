"""The list of what chunks were encoded against, as a manifest is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dino_exp.checkpoint.manifest import Chunk, closure


class BaseList:
    """Chunks by their places, each listed once and after what it builds on."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._places: dict[Chunk, int] = {}

    def place(self, chunk: Chunk) -> int:
        """Where a chunk is listed, whose own bases are places in this list; it is added if it is new."""
        if chunk not in self._places:
            self._places[chunk] = len(self.chunks)
            self.chunks.append(chunk)
        return self._places[chunk]

    def adopt(self, chunk: Chunk, bases: Sequence[Chunk]) -> Chunk:
        """A chunk of another manifest, whose bases those are, as this list describes it."""
        adopted: dict[Chunk, Chunk] = {}
        for part in (*(bases[place] for place in closure(chunk, bases)), chunk):
            adopted[part] = replace(part, bases=tuple(self.place(adopted[bases[place]]) for place in part.bases))
        return adopted[chunk]
