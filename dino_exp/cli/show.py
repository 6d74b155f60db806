"""How values look on the command line: sizes and ages in human units, kinds in colours, tables, JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell: TypeAlias = str | Text  # a Text holds nothing that came from a file unless it went through `plain`

_MOST_FOLDED = 200
_KIND_STYLES = {"latest": "green", "milestone": "cyan", "pinned": "magenta", "emergency": "red"}


def console() -> Console:
    """Standard output; wide enough for whole lines when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def plain(text: str, keep: str = "") -> str:
    """`text` with an escape for each character that could move a cursor, recolour a terminal, or not be encoded.

    Names and notes come from files that a stranger may have written. Characters in `keep` stay.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else ascii(char)[1:-1] for char in text)


def kinds_text(kinds: Sequence[str]) -> Text:
    """Kinds, each in its colour where there are colours."""
    return _coloured_kinds(tuple(kinds))


@cache  # a long listing has few combinations of them
def _coloured_kinds(kinds: tuple[str, ...]) -> Text:
    return Text(" ").join(Text(plain(kind), _KIND_STYLES.get(kind, "yellow")) for kind in kinds)  # yellow: a best


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in `right` are right-aligned. Cells are text of files: no markup, `plain`."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        made.add_column(Text(plain(name)), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(_cell, row))
    return made


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Sequence[str] = ()) -> None:
    """Print a table; a long one without folding its cells and without colours: rich takes a millisecond a row."""
    out = console()
    if len(rows) <= _MOST_FOLDED:
        out.print(table(columns, rows, right=right))
        return
    lines = [
        list(map(plain, columns)),
        *([cell.plain if isinstance(cell, Text) else plain(cell) for cell in row] for row in rows),
    ]
    widths = [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]
    sides = [">" if name in right else "<" for name in columns]
    head, *rest = (
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)).rstrip()
        for line in lines
    )
    out.print(Text(head, "bold"), soft_wrap=True)
    print("\n".join(rest))  # what has no style needs no rich, which takes as long as all before


def _cell(cell: Cell) -> Text:
    return cell if isinstance(cell, Text) else Text(plain(cell))


def metric_text(metrics: Mapping[str, Any], name: str) -> str:
    """A metric to four digits, or a dash when it was not measured."""
    value = metrics.get(name)
    return f"{value:.4f}" if isinstance(value, float) else "–" if value is None else str(value)
