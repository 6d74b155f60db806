"""The bar of long work: seen on a terminal, and nowhere else."""

import io

from rich.console import Console

from dino_exp.loggers.bar import WorkBar


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    with WorkBar(Console(file=out, force_terminal=terminal, width=100)) as bar:
        bar.tell("features", 1, 4)
        bar.tell("features", 2, 4)
        bar.tell("probes", 3, 7)
    return out.getvalue()


def test_a_terminal_sees_how_far_each_work_is():
    text = shown(terminal=True)
    assert "probes" in text
    assert "3/7" in text


def test_a_file_sees_nothing():
    assert shown(terminal=False).strip() == ""
