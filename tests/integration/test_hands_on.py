"""The walks of docs/hands-on and docs/own-images.md, command by command, in an empty folder, and what they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted((DOCS / "hands-on").glob("[0-9]-*.md"))
BLOCK = re.compile(r"```(sh|text)\n(.*?)```", re.DOTALL)
SECS = 300


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, each with the lines that are to be seen in what they print."""
    found: list[tuple[str, list[str]]] = []
    for kind, text in BLOCK.findall(page.read_text()):
        if kind == "sh":
            found.append((text, []))
        else:
            found[-1][1].extend(text.splitlines())
    return found


def words(text: str) -> str:
    """Without what differs from run to run: spaces between columns, and numbers."""
    return re.sub(r"[0-9][0-9,.]*", "#", " ".join(text.split()))


@pytest.mark.slow
@pytest.mark.parametrize("page", [*PAGES, DOCS / "own-images.md"], ids=lambda page: page.stem)
def test_a_walk_goes_as_it_is_told(page: Path, tmp_path: Path) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    shell = subprocess.Popen(
        ["bash"], cwd=tmp_path, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert shell.stdin is not None
    assert shell.stdout is not None
    steps = blocks(page)
    assert len(steps) > 4
    script = "set -eo pipefail\n"
    for number, (commands, _) in enumerate(steps):
        script += f"{commands}\nwait\necho; echo '=== end of {number}'\n"
    printed, _ = shell.communicate(script, timeout=SECS)
    assert shell.returncode == 0, printed
    parts = re.split(r"=== end of \d+\n", printed)
    for (commands, expected), found in zip(steps, parts, strict=False):
        for line in expected:
            assert words(line) in words(found), f"{commands}\nprinted\n{found}\nwithout\n{line}"


def test_there_are_three_walks_that_are_linked() -> None:
    text = (PAGES[0].parent / "README.md").read_text()
    assert len(PAGES) == 3
    assert all(page.name in text for page in [*PAGES, DOCS / "own-images.md"])
