"""Reports of a real run and a real sweep in a real browser, on a desk and on a phone, by mouse and by keyboard."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser.conftest import Browser
from support.runs import Lab

pytestmark = pytest.mark.browser

WIDTHS = {"desk": 1280, "phone": 390}
LONG = 'run.note="<img src=x onerror=alert(1)> & a note"'


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run that was stopped and continued, and that of a sweep with one failure."""
    lab = Lab(tmp_path_factory.mktemp("pages"))
    lab.train("train.stop_after_epochs=1", LONG)
    lab.train()
    run = lab.only_run()
    lab.cli("checkpoints", "report", str(run))
    lab.train("--multirun", "seed=1,2", "optimizer.lr=1e-3,1e9", "sweep.name=look", code=1)
    lab.cli("sweeps", "report", "look")
    return {"run": run / "report.html", "sweep": lab.outputs / "sweeps" / "look" / "report.html"}


@pytest.fixture(scope="module")
def browser(make_browser: Callable[[Path], Browser], tmp_path_factory: pytest.TempPathFactory) -> Browser:
    made = make_browser(tmp_path_factory.mktemp("downloads"))
    made.downloads = tmp_path_factory.getbasetemp() / "downloads0"  # type: ignore[attr-defined]
    return made


@pytest.fixture(params=["run", "sweep"])
def page(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_a_page_is_drawn_without_an_error(browser: Browser, page: Path, device: str, dark: bool) -> None:
    browser.open(page, width=WIDTHS[device], dark=dark)
    assert browser.errors() == []
    boxes = browser.js(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "return [...document.querySelectorAll('figure svg')].map(s => [s.getBoundingClientRect().width,"
        " s.getBoundingClientRect().height, s.querySelectorAll('path, use, image').length])"
    )
    assert len(boxes) >= 2
    assert all(width > 200 and height > 40 and drawn > 3 for width, height, drawn in boxes)
    assert browser.js("return document.documentElement.scrollWidth") <= WIDTHS[device]  # only tables scroll sideways
    assert browser.js("return document.querySelectorAll('img').length") == 0  # and a note stays a note


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pictures_take_the_colours_of_the_page(browser: Browser, pages: dict[str, Path], dark: bool) -> None:
    browser.open(pages["run"], width=1280, dark=dark)
    paper, ink = browser.js(
        "const s = getComputedStyle(document.body);"
        "const t = [...document.querySelectorAll('figure svg text')].find(t => t.textContent.trim() === 'epoch');"
        "return [s.backgroundColor, getComputedStyle(t).fill]"
    )
    dark_paper, light_ink = sum(_numbers(paper)) < 200, sum(_numbers(ink)) > 500
    assert (dark_paper, light_ink) == (dark, dark)


def _numbers(colour: str) -> list[int]:
    return [int(float(part)) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]


def test_tables_sort_up_and_down_and_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["sweep"], width=1280)
    column = "return [...document.querySelectorAll('#jobs tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    heads = browser.js("return [...document.querySelectorAll('#jobs th')].map(h => h.textContent)")
    place = heads.index("optimizer.lr")
    button = "return document.querySelectorAll('#jobs th button')[arguments[0]]"
    browser.find(button, place).click()
    down = [float(text) for text in browser.js(column, place)]
    assert down == sorted(down, reverse=True)
    assert down[0] != down[-1]
    from selenium.webdriver.common.keys import Keys

    browser.find(button, place).send_keys(Keys.ENTER)
    up = [float(text) for text in browser.js(column, place)]
    assert up == sorted(up)
    assert browser.js(f"{button}.parentElement.getAttribute('aria-sort')", place) == "ascending"
    assert "optimizer.lr" in browser.js("return document.getElementById('said').textContent")
    browser.driver.refresh()
    assert [float(text) for text in browser.js(column, place)] == up  # what the reader chose outlives a reload


def test_values_that_are_missing_come_last_either_way(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["sweep"], width=1280)
    heads = browser.js("return [...document.querySelectorAll('#jobs th')].map(h => h.textContent)")
    place = heads.index("knn_top1")
    column = "return [...document.querySelectorAll('#jobs tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    for _ in range(2):
        browser.js("document.querySelectorAll('#jobs th button')[arguments[0]].click()", place)
        shown = browser.js(column, place)
        assert shown.index("–") >= len([text for text in shown if text != "–"])


def test_commands_copy(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.driver.execute_cdp_cmd("Browser.grantPermissions", origin)
    line = browser.js("return document.querySelector('.command code').textContent")
    browser.find("return document.querySelector('.copy')").click()
    _until(lambda: browser.js("return document.getElementById('said').textContent") == "copied")
    assert browser.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == line


def test_pictures_are_saved_as_png(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"], width=1280)
    browser.js("document.querySelector('#timeline .export').click()")
    saved = browser.downloads / "timeline.png"  # type: ignore[attr-defined]
    _until(saved.exists)
    from PIL import Image

    _until(lambda: saved.stat().st_size > 10_000)
    with Image.open(saved) as image:
        assert image.width > 1200
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 8
    assert browser.errors() == []


def test_everything_is_reached_by_keyboard_and_named(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    unnamed = browser.js(
        "return [...document.querySelectorAll('button, a, [tabindex=\"0\"], svg[role=img]')].filter(e =>"
        " !(e.getAttribute('aria-label') || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert unnamed == []
    from selenium.webdriver.common.keys import Keys

    browser.js("document.body.focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.js("return document.activeElement.textContent") == "Skip to the content"
    links = browser.js("return [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href'))")
    assert all(browser.js("return document.querySelector(arguments[0]) !== null", link) for link in links)
    assert browser.js("return document.querySelectorAll('h1').length") == 1
    assert browser.js("return document.documentElement.lang") == "en"


def test_an_open_page_of_a_running_training_shows_the_newer_one(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "live.html"
    text = pages["run"].read_text().replace("<body>", '<body data-refresh="1">')
    text = text.replace("</header>", '<button id="pause"></button></header>')
    page.write_text(text.replace("<h1>", "<h1>first "))
    browser.open(page, width=1280)
    browser.js("document.querySelector('#settings details').open = true")
    page.write_text(text.replace("<h1>", "<h1>second "))
    _until(lambda: "second" in browser.js("return document.querySelector('h1').textContent"))
    assert browser.js("return document.querySelector('#settings details').open")  # folds stay as they were
    browser.js("document.getElementById('pause').click()")
    page.write_text(text.replace("<h1>", "<h1>third "))
    time.sleep(2.5)
    assert "second" in browser.js("return document.querySelector('h1').textContent")
    assert browser.js("return document.getElementById('pause').textContent") == "Go on"


def _until(holds: Callable[[], Any], secs: float = 10.0) -> None:
    end = time.monotonic() + secs
    while time.monotonic() < end:
        if holds():
            return
        time.sleep(0.05)
    pytest.fail(f"did not come within {secs} s")
