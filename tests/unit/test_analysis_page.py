"""Documents as pages: one file that fetches nothing, and in which the text of a run is text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from dino_exp.analysis.page.document import (
    Alarm,
    Command,
    Document,
    Facts,
    Figure,
    Folded,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    cell,
)
from dino_exp.analysis.page.html import to_html
from dino_exp.analysis.page.markdown import to_markdown
from dino_exp.analysis.style import DARK, LIGHT, STUDENT, Picture, house, new_figure
from dino_exp.errors import UsageError

EVIL = "<script>alert(1)</script>\"'&| `x` [a](javascript:x)\n# h"
VOID = {"meta", "link", "wbr", "br", "img", "input"}


class Reader(HTMLParser):
    """Checks that elements close as they opened, and gathers what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def picture(name: str = "curve", alt: str = "It rises.") -> Picture:
    with house():
        figure = new_figure()
        figure.subplots().plot([0, 1], [1, 2], color=STUDENT)
    return Picture(name=name, title="A curve", alt=alt, figure=figure)


def document(text: str = "plain", refresh_secs: int | None = None) -> Document:
    blocks = [
        Text(text),
        Alarm(text),
        Facts([(text, text)]),
        Tiles([Tile(text, text, text)]),
        Table(title=text, columns=(text, "n"), rows=[[cell(text), cell(2.5)], [cell(None), cell(float("nan"))]]),
        Figure(picture(alt=text), text),
        Command(text, text),
        Folded(text, [Text(text), Figure(picture("other"), "")]),
    ]
    sections = [Section(title=text, anchor="one", blocks=blocks)]
    return Document(
        title=text, subtitle=text, made_at="2026-01-02T03:04:05.000000Z", sections=sections, refresh_secs=refresh_secs
    )


def test_a_page_is_whole_and_fetches_nothing() -> None:
    page = to_html(document())
    reader = read(page)
    addresses = [
        value for _, found in reader.seen for name, value in found.items() if name in ("src", "href") and value
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "default-src 'none'" in page
    assert len(reader.of("svg")) == 2
    assert all(found["aria-label"] for found in reader.of("svg"))
    assert [found["href"] for found in reader.of("a")][:2] == ["#main", "#one"]
    assert "2026-01-02 03:04 UTC" in reader.text


def test_the_text_of_a_run_is_never_markup() -> None:
    def names(seen: tuple[str, dict[str, str | None]]) -> list[str]:
        return sorted(set(seen[1]) - {"class"})  # by which long cells are told apart

    plain, evil = (read(to_html(document(text)).replace("<wbr>", "")) for text in ("plain", EVIL))
    assert [tag for tag, _ in plain.seen] == [tag for tag, _ in evil.seen]
    assert list(map(names, plain.seen)) == list(map(names, evil.seen))
    assert "alert(1)" in evil.text


def test_colours_of_a_page_are_variables_in_both_themes() -> None:
    page = to_html(document())
    svg = re.search(r"<svg.*?</svg>", page, re.DOTALL)
    assert svg is not None
    assert "var(--student)" in svg[0]
    assert not any(colour in svg[0] for colour in LIGHT.values())
    assert all(f"--{name}: {colour};" in page for colours in (LIGHT, DARK) for name, colour in colours.items())
    assert LIGHT.keys() == DARK.keys()


def test_a_picture_for_dark_pages_has_their_colours() -> None:
    dark = picture().svg(dark=True)
    assert all(DARK[name] in dark for name in ("paper", "ink", "student"))
    assert not any(colour in dark for colour in LIGHT.values())


def test_tables_carry_what_they_are_sorted_by() -> None:
    reader = read(to_html(document()))
    assert [found.get("data-sort") for found in reader.of("td")] == [None, "2.5", None, None]
    assert [found.get("class") for found in reader.of("th")] == [None, "number"]


def test_only_a_live_page_refreshes_itself() -> None:
    assert "data-refresh" not in to_html(document()).split("<script>")[0]
    live = to_html(document(refresh_secs=20))
    assert '<body data-refresh="20">' in live
    assert 'id="pause"' in live


def test_two_pictures_in_a_page_do_not_share_names() -> None:
    page = to_html(document())
    names = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(names) == len(set(names)) > 1


def test_markdown_says_the_same_and_no_text_is_markup() -> None:
    text = to_markdown(document(), "pictures")
    assert "![plain](pictures/curve.svg)" in text
    assert "| plain | 2.5 |" in text
    assert "![plain](my%20run%20%281%29/curve.svg)" in to_markdown(document(), "my run (1)")
    evil = to_markdown(document(EVIL), "pictures").splitlines()
    assert not any(line.startswith(("# h", "<script")) for line in evil)
    assert len([line for line in evil if line.startswith("# ")]) == 1
    heads = [line for line in evil if line.startswith("| ") and "alert" in line]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4) for line in heads)


def test_the_same_picture_is_the_same_file() -> None:
    assert picture().svg() == picture().svg()
    assert picture("a").svg() != picture("b").svg()


@pytest.mark.parametrize(("suffix", "begins"), [(".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_pictures_as_files(tmp_path, suffix: str, begins: bytes) -> None:
    picture().save(tmp_path / f"x{suffix}")
    assert (tmp_path / f"x{suffix}").read_bytes().startswith(begins)


def test_another_suffix_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"expected a name that ends in \.svg, \.png or \.pdf"):
        picture().save(tmp_path / "x.gif")


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_every_colour_but_that_of_the_grid_can_be_read_as_text(theme: dict[str, str]) -> None:
    """WCAG 2.1: 4.5. Lines, lanes and captions are named in their colours."""
    paper = luminance(theme["paper"])
    for name, colour in theme.items():
        if name in ("paper", "grid"):
            continue
        one, other = sorted((luminance(colour), paper))
        assert (other + 0.05) / (one + 0.05) >= 4.5, name


def test_the_style_sheet_has_the_colours_of_the_house() -> None:
    sheet = (files("dino_exp.analysis") / "house.mplstyle").read_text()
    found = set(re.findall(r"\b[0-9a-f]{6}\b", sheet))
    assert found == {LIGHT[name].removeprefix("#") for name in ("paper", "ink", "quiet", "grid")}
