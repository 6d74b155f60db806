"""A real browser: Debian's Chromium, driven by Selenium. `make test-browser` installs what it needs."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


class Browser:
    """One page at a time."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.as_uri())

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, script: str, *arguments: Any) -> Any:
        """An element, brought to the middle of the window at once, so that a click meets it."""
        found = self.js(script, *arguments)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
        return found

    def errors(self) -> list[str]:
        """What the console says, warnings included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def screenshot(self, path: Path) -> None:
        taken = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(taken["data"]))


@pytest.fixture(scope="session")
def make_browser() -> Iterator[Callable[[Path], Browser]]:
    if CHROMIUM is None or DRIVER is None:
        pytest.fail("no chromium and chromedriver: `make test-browser` installs them (apt-get install chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    drivers = []

    def make(downloads: Path) -> Browser:
        options = Options()
        for argument in _ARGUMENTS:
            options.add_argument(argument)
        options.binary_location = CHROMIUM
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        drivers.append(driver)
        return Browser(driver)

    yield make
    for driver in drivers:
        driver.quit()
