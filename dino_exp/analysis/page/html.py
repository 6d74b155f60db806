"""A document as one HTML file: no network, no server, no other file. What it holds of a run is text, never markup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from dino_exp.analysis.page.document import (
    Alarm,
    Block,
    Cell,
    Command,
    Document,
    Facts,
    Figure,
    Folded,
    Section,
    Table,
    Text,
    Tiles,
)
from dino_exp.analysis.style import DARK, LIGHT

# Nothing may be fetched or sent, whatever a run's files say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'"


def to_html(document: Document) -> str:
    """The whole page."""
    refresh = "" if document.refresh_secs is None else f' data-refresh="{document.refresh_secs}"'
    live = "" if document.refresh_secs is None else _LIVE
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(document.title)}</title>
<link rel="icon" href="data:,">
<style>
:root {{ {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
{_resource("page.css")}</style>
</head>
<body{refresh}>
<a class="skip" href="#main">Skip to the content</a>
<header>
<h1>{_breakable(document.title)}</h1>
<p>{escape(document.subtitle)}</p>
<p class="quiet">Written {_time(document.made_at)}{live}</p>
</header>
<nav aria-label="Contents"><ul>
{_join(f'<li><a href="#{one.anchor}">{escape(one.title)}</a></li>' for one in document.sections)}
</ul></nav>
<main id="main" tabindex="-1">
{_join(map(_section, document.sections))}
</main>
<p id="said" role="status" aria-live="polite"></p>
<script>
{_resource("page.js")}</script>
</body>
</html>
"""


_LONG_CHARS = 36  # of a cell that may take several lines
_LIVE = ' · <span id="live">looks for a newer one by itself</span> <button type="button" id="pause">Pause</button>'


def _section(section: Section) -> str:
    head = f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
    title = f'<h2 id="{section.anchor}-title">{escape(section.title)}</h2>'
    return f"{head}\n{title}\n{_join(map(_block, section.blocks))}\n</section>"


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Alarm(text):
            return f'<p class="alarm" role="note"><strong>Note:</strong> {escape(text)}</p>'
        case Facts(rows):
            return f"<dl>{_join(f'<dt>{escape(name)}</dt><dd>{_breakable(value)}</dd>' for name, value in rows)}</dl>"
        case Tiles(tiles):
            return f'<ul class="tiles">{_join(map(_tile, tiles))}</ul>'
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Command(line, about):
            copy = f'<button type="button" class="copy" aria-label="Copy the command: {escape(about)}">Copy</button>'
            code = f'<pre tabindex="0"><code>{escape(line)}</code></pre>'
            return f'<div class="command"><p>{escape(about)}</p>{code}{copy}</div>'
        case Folded(title, blocks):
            return f"<details><summary>{escape(title)}</summary>\n{_join(map(_block, blocks))}\n</details>"


def _tile(tile: object) -> str:
    name, value, about = (escape(str(getattr(tile, part))) for part in ("name", "value", "about"))
    return f"<li><span>{name}</span><b>{value}</b><small>{about}</small></li>"


def _table(table: Table) -> str:
    numeric = [_is_numeric([row[place] for row in table.rows]) for place in range(len(table.columns))]
    heads = _join(
        f'<th scope="col"{_side(right)}><button type="button">{escape(name)}</button></th>'
        for name, right in zip(table.columns, numeric, strict=True)
    )
    rows = _join(
        "<tr>" + "".join(_cell(cell, right) for cell, right in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}"><table>'
        f"<caption>{escape(table.title)}</caption><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _is_numeric(cells: Sequence[Cell]) -> bool:
    return any(cell.number is not None for cell in cells)


def _cell(cell: Cell, right: bool) -> str:
    number = cell.number
    key = "" if number is None or not math.isfinite(number) else f' data-sort="{number!r}"'
    long = ' class="long"' if not right and len(cell.text) > _LONG_CHARS else ""
    return f"<td{_side(right) or long}{key}>{escape(cell.text)}</td>"


def _side(right: bool) -> str:
    return ' class="number"' if right else ""


def _figure(figure: Figure) -> str:
    picture = figure.picture
    title = escape(picture.title)
    export = (
        f'<button type="button" class="export" data-name="{escape(picture.name)}">'
        f'Save as PNG<span class="hidden">: {title}</span></button>'
    )
    caption = f"<b>{title}.</b> {escape(figure.caption)} {export}"
    drawn = f'<div class="scroll picture">{picture.svg_for_page()}</div>'
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _breakable(text: str) -> str:
    """Long names may break behind a sign."""
    return escape(text).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _time(moment: str) -> str:
    shown = moment[:16].replace("T", " ")
    return f'<time datetime="{escape(moment)}">{escape(shown)} UTC</time>'


def _resource(name: str) -> str:
    return (files("dino_exp.analysis.page") / name).read_text(encoding="utf-8")


def _join(parts: object) -> str:
    return "\n".join(parts)  # type: ignore[arg-type]
