"""Fixtures for whole trainings, and the count of what the tests have survived."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import Lab

LONG = ("crash", "integration")  # folders of tests that take seconds each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: begun last, one of them would keep one process busy while the others have nothing left."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)


@pytest.fixture(autouse=True, scope="session")
def usual_heap() -> Iterator[None]:
    """The tests' own process keeps the usual heap, for tests that bound its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino_exp.attempts.numerics.keep_freed_memory", lambda: False)
        yield


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty outputs directory, and the commands that write to it."""
    return Lab(tmp_path)


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Says how many faults of a kind a test has caused, all of which must have ended well where it passes."""
    return lambda what, number: record_property(f"survived {what}", number)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, number in report.user_properties:
            if name.startswith("survived "):
                counts[name.removeprefix("survived ")] += int(str(number))
    if counts:
        terminalreporter.section("faults that ended well, all of them")
    for what, number in sorted(counts.items()):
        terminalreporter.write_line(f"{number:9,} {what}")
