"""The house style: one sheet, one set of colours that tell apart for every eye, and pictures as SVG or PNG.

A picture is drawn once. Its few colours stand in the SVG as they are, for files; in a page they are variables, so that
the page decides whether it is light or dark.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_exp.errors import UsageError
from dino_exp.fsio import make_dirs, write_shared

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a page has under these names, light and dark; matplotlib draws with the light ones. The five of data are those of
# Okabe and Ito (2008), darkened until each can be read as text, and so far apart that they still differ to every eye.
LIGHT = {
    "paper": "#fdfdfb",
    "ink": "#23272e",
    "quiet": "#6b717a",
    "grid": "#e3e5e8",
    "student": "#0072b2",
    "teacher": "#c84b00",
    "best": "#00805d",
    "milestone": "#8f2f86",
    "pinned": "#665000",
    "alarm": "#c1121f",
}
DARK = {
    "paper": "#16181d",
    "ink": "#e6e8eb",
    "quiet": "#8d949e",
    "grid": "#30343b",
    "student": "#56b4e9",
    "teacher": "#f0894a",
    "best": "#2fc79a",
    "milestone": "#dd8fbe",
    "pinned": "#e6b422",
    "alarm": "#ff6b6b",
}
PAPER, INK, QUIET, GRID = (LIGHT[name] for name in ("paper", "ink", "quiet", "grid"))
STUDENT, TEACHER, BEST, MILESTONE, PINNED, ALARM = (
    LIGHT[name] for name in ("student", "teacher", "best", "milestone", "pinned", "alarm")
)
SERIES = (STUDENT, TEACHER, BEST, MILESTONE, PINNED, QUIET)  # of curves that stand for nothing of the above
HEAT = "cividis"  # of heat maps: the same order of brightness for every eye
WIDTH = 6.4  # inches of a picture that takes the width of a page

SUFFIXES = (".svg", ".png", ".pdf")
_SHEET = "house.mplstyle"
_HEADER = re.compile(r"\A.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'<svg([^>]*?) width="[^"]*"([^>]*?)', re.DOTALL)


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A finished picture. `name` is that of its file; `alt` says in a sentence what is to be seen."""

    name: str
    title: str
    alt: str
    figure: Figure

    def svg(self, *, dark: bool = False) -> str:
        """As a file of its own, for a light or a dark page. The same picture gives the same text."""
        return _coloured(self._drawn, DARK) if dark else self._drawn

    def svg_for_page(self) -> str:
        """As an element of a page, whose variables (`--ink`, ...) colour it."""
        text = _METADATA.sub("", _HEADER.sub("", self._drawn, count=1), count=1)
        variables = {name: f"var(--{name})" for name in LIGHT}
        return _as_element(_coloured(text, variables), self.alt)

    def png(self) -> bytes:
        """As a PNG, in light colours."""
        return self._saved("png", {"Software": None, "Description": self.alt})

    def save(self, path: Path) -> None:
        """Write it in the format of the name; a missing folder is made. Raises as `check_suffix`, OSError."""
        check_suffix(path, "picture")
        make_dirs(path.absolute().parent)
        makers: dict[str, Callable[[], str | bytes]] = {".svg": self.svg, ".png": self.png, ".pdf": self._pdf}
        write_shared(path, makers[path.suffix](), durable=False)

    def _pdf(self) -> bytes:
        return self._saved("pdf", {"CreationDate": None, "Title": self.title})

    @cached_property
    def _drawn(self) -> str:  # once: a layout that is done again moves by a hair
        return self._saved("svg", {"Date": None, "Title": self.title}).decode()

    def _saved(self, form: str, metadata: dict[str, str | None]) -> bytes:
        into = io.BytesIO()
        # Names within an SVG are its own, also beside others in a page; and matplotlib gives a figure without a layout
        # the one of its settings when it has saved it.
        with house({"svg.hashsalt": self.name, "figure.constrained_layout.use": False}):
            self.figure.savefig(into, format=form, metadata=metadata)
        return into.getvalue()


def check_suffix(path: Path, option: str, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raises UsageError for a name with none of these suffixes, or in a place where no file can be written."""
    if path.suffix not in suffixes:
        *others, last = suffixes
        raise UsageError(f"{option} {path}: expected a name that ends in {', '.join(others)} or {last}")
    if path.is_dir():
        raise UsageError(f"{option} {path}: is a folder; choose another name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        what = "may not be written to" if folder.is_dir() else "is no folder"
        raise UsageError(f"{option} {path}: {folder} {what}; choose another place")


@contextlib.contextmanager
def house(more: dict[str, Any] | None = None) -> Iterator[None]:
    """Inside, matplotlib draws in the house style."""
    from importlib.resources import as_file, files

    import matplotlib as mpl

    with as_file(files("dino_exp.analysis") / _SHEET) as sheet:
        parameters: dict[Any, Any] = dict(mpl.rc_params_from_file(sheet, use_default_template=False))
    with mpl.rc_context(parameters | (more or {})):
        yield


def new_figure(height: float = 3.2, *, width: float = WIDTH) -> Figure:
    """An empty figure, in inches. To be called, as whatever draws on it, inside of `house`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def framed_figure(
    height: float,
    *,
    width: float = WIDTH,
    left: float = 0.62,
    right: float = 0.08,
    top: float = 0.08,
    bottom: float = 0.48,
    wspace: float = 0.0,
    hspace: float = 0.0,
) -> Figure:
    """An empty figure with fixed margins in inches, and gaps between axes as shares of these.

    For pictures of which it is known what stands beside the axes: a layout that matplotlib finds itself takes as long
    as all of the drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="none")  # type: ignore[arg-type]  # as documented
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height, wspace=wspace,
        hspace=hspace,
    )  # fmt: skip
    return figure


def bare(axes: Axes) -> None:
    """No lines around or within: for maps, whose cells are lines enough."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def percent(share: float | None) -> float:
    """In percent; NaN, which is not drawn, where there is none."""
    return math.nan if share is None else 100 * share


def note(axes: Axes, text: str) -> None:
    """Say in the middle of an empty picture why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
    axes.set_xticks([])
    axes.set_yticks([])
    bare(axes)


def _coloured(svg: str, colours: Mapping[str, str]) -> str:
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, colours[name])
    return svg


def _as_element(svg: str, alt: str) -> str:
    from html import escape

    sized = _SIZE.sub(r"<svg\1\2", svg, count=1)
    sized = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", sized, count=1)
    return sized.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
