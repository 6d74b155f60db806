"""How values look on the command line."""

from __future__ import annotations

import pytest

from dino_exp.cli.show import print_table, size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (701_000_000, "701 MB"), (2.5e9, "2.5 GB"), (3e13, "30000 GB")],
)
def test_sizes_in_human_units(num_bytes: float, text: str) -> None:
    assert size_text(num_bytes) == text


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
