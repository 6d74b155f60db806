"""A document as Markdown, with its pictures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from urllib.parse import quote

from dino_exp.analysis.page.document import (
    Alarm,
    Block,
    Command,
    Document,
    Facts,
    Figure,
    Folded,
    Table,
    Text,
    Tiles,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def to_markdown(document: Document, pictures: str) -> str:
    """The text. `pictures` is the folder, relative to the file, in which each picture lies as `<name>.svg`."""
    lines = [f"# {_escaped(document.title)}", "", _escaped(document.subtitle), "", f"Written {document.made_at}", ""]
    for section in document.sections:
        lines += [f"## {_escaped(section.title)}", ""]
        for block in section.blocks:
            lines += [*_lines(block, pictures), ""]
    return "\n".join(lines)


def _lines(block: Block, pictures: str) -> Iterator[str]:
    match block:
        case Text(text):
            yield _escaped(text)
        case Alarm(text):
            yield f"> **Note:** {_escaped(text)}"
        case Facts(rows):
            yield from _rows(("", ""), rows)
        case Tiles(tiles):
            yield from _rows(("", "", ""), [(tile.name, tile.value, tile.about) for tile in tiles])
        case Table():
            yield from _rows(block.columns, [[cell.text for cell in row] for row in block.rows])
        case Figure(picture, caption):
            yield f"![{_escaped(picture.alt)}]({quote(pictures)}/{picture.name}.svg)"
            yield ""
            yield f"*{_escaped(picture.title)}.* {_escaped(caption)}".rstrip()
        case Command(line, about):
            yield _escaped(about) + ":"
            yield ""
            yield from (f"    {part}" for part in line.splitlines())
        case Folded(title, blocks):
            yield f"### {_escaped(title)}"
            for inner in blocks:
                yield ""
                yield from _lines(inner, pictures)


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(map(_escaped, columns)) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(_escaped, row)) + " |"


def _escaped(text: str) -> str:
    """No text of a run is markup, nor ends a line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
