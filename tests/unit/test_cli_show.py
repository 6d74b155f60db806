"""How values look on the command line."""

from __future__ import annotations

import pytest

from dino_exp.cli.show import print_table
from dino_exp.words import age_text, count_text, size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (701_000_000, "701 MB"), (2.5e9, "2.5 GB"), (3e13, "30000 GB")],
)
def test_sizes_in_human_units(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


@pytest.mark.parametrize(
    ("secs", "text"),
    [
        (-30, "0s ago"), (0, "0s ago"), (59, "59s ago"), (60, "1m ago"), (3599, "59m ago"), (7200, "2h ago"),
        (86_400, "1d ago"), (29 * 86_400, "29d ago"), (30 * 86_400, "2001-09-09"), (-3600, "2001-09-09"),
    ],
)  # fmt: skip
def test_ages_in_human_units(secs: float, text: str) -> None:
    """A month ago or in the future by the clock: the day itself."""
    assert age_text("2001-09-09T01:46:40.000+00:00", 1e9 + secs) == text


@pytest.mark.parametrize("created_at", ["", "yesterday", "9999-12-31T23:59:59-23:59", "\x1b[31m"])
def test_a_time_that_is_none_is_shown_as_it_is(created_at: str) -> None:
    assert age_text(created_at, 1e9) in (created_at, created_at[:10])


def test_counts() -> None:
    assert [count_text(num, "run") for num in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]


def test_a_long_table_looks_like_a_short_one(capsys: pytest.CaptureFixture[str]) -> None:
    row = ("7", "latest best", "ö\x1b[31m", "日本")
    printed = []
    for num_rows in (3, 300):
        print_table(("step", "kinds", "note", "wide"), [row] * num_rows, right=("step",))
        printed.append([line.rstrip() for line in capsys.readouterr().out.splitlines()])
    short, long = printed
    assert (len(short), len(long)) == (4, 301)
    assert long[:4] == short
    assert "\x1b" not in "".join(long)
