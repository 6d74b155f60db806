"""What a report is made of, whatever it is written as. Text is text: whoever writes it out escapes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from dino_exp.analysis.style import Picture


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is shown, and the number by which its column is sorted, where it is one."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Alarm:
    """Something that must not be missed."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names with values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Tile:
    """One number that people look for first."""

    name: str
    value: str
    about: str = ""


@dataclass(frozen=True)
class Tiles:
    """These side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows below names, which can be sorted in a page. `title` names it for those who do not see it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """A picture and what there is to be seen on it."""

    picture: Picture
    caption: str = ""


@dataclass(frozen=True)
class Command:
    """A line to be typed, and what it does."""

    line: str
    about: str


@dataclass(frozen=True)
class Folded:
    """What only some want to see."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = Text | Alarm | Facts | Tiles | Table | Figure | Command | Folded


@dataclass(frozen=True, kw_only=True)
class Section:
    """A chapter; `anchor` is its name in links."""

    title: str
    anchor: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A report. `made_at` is ISO 8601, UTC; `refresh_secs` says after how long an open page looks for a newer one."""

    title: str
    subtitle: str
    made_at: str
    sections: Sequence[Section]
    refresh_secs: int | None = None

    def pictures(self) -> Iterator[Picture]:
        """All of them, in their order."""
        for section in self.sections:
            yield from pictures_of(section.blocks)


def pictures_of(blocks: Sequence[Block]) -> Iterator[Picture]:
    """The pictures of some blocks, folded ones too."""
    for block in blocks:
        if isinstance(block, Figure):
            yield block.picture
        elif isinstance(block, Folded):
            yield from pictures_of(block.blocks)


def cell(value: str | float | None, digits: str = ".6g") -> Cell:
    """A cell of a text or of a number; a dash for neither."""
    if value is None:
        return Cell("–")
    if isinstance(value, str):
        return Cell(value)
    return Cell(format(value, digits), float(value))
