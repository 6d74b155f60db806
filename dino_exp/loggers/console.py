"""The console: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from dino_exp.words import duration_text

log = logging.getLogger(__name__)

PLAIN_LINE_SECS = 15.0  # at least so far apart are plain lines that carry no evaluation

SHOWN = ("loss", "knn_top1", "knn_1shot", "val_loss", "entropy_ratio", "kl")


def is_evaluated(row: Mapping[str, Any]) -> bool:
    """Whether a metrics row carries an evaluation, or baselines."""
    return any("knn" in name or name == "val_loss" for name in row)


def row_text(row: Mapping[str, Any]) -> str:
    """The numbers of a metrics row that people follow, in one line."""
    parts = [f"{name} {row[name]:.4f}" for name in SHOWN if row.get(name) is not None]
    parts += [
        f"{name} {value:.4f}" for name, value in row.items() if name.startswith(("init_knn_top1", "pixel_knn_top1"))
    ]
    return "  ".join(parts)


class SteadyConsole(Console):
    """A console whose reader may go away (`| head`), or whose disk be full: it falls silent; the training goes on."""

    def print(self, *objects: Any, **options: Any) -> None:
        """The same as of any console, but for output that takes no more: that is said once, in the log."""
        try:
            super().print(*objects, **options)
        except OSError as problem:
            self.on_broken_pipe()
            log.warning("standard output: %s; nothing more is printed there", problem.strerror or problem)

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 (for the rest of the process)


class ConsoleProgress:
    """Shows progress of steps `start_step` to `stop_step`. Use as a context manager.

    On a terminal: a bar with throughput, time left and the age of the last checkpoint. Elsewhere: one line for
    each evaluation and now and then in between.
    """

    def __init__(
        self,
        console: Console,
        *,
        fancy: bool,
        start_step: int,
        stop_step: int,
        batch_size: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.fancy, self.clock = console, fancy, clock
        self.start_step, self.stop_step, self.batch_size = start_step, stop_step, batch_size
        self.step = start_step
        self.images_per_sec = 0.0
        self.saved_at: float | None = None
        self.saved_step: int | None = None
        self.started_at = self.last_line_at = clock()
        self.latest = ""
        self.bar = Progress(
            SpinnerColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,
        )
        self.task = self.bar.add_task("train", total=stop_step, completed=start_step, facts="")

    def __enter__(self) -> ConsoleProgress:
        if self.fancy:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.fancy:
            self.bar.stop()

    def advance(self, step: int, images_per_sec: float) -> None:
        """A step is done."""
        self.step = step
        self.images_per_sec = images_per_sec or self.images_per_sec
        if self.fancy:
            self.bar.update(self.task, completed=step, facts=self.facts())
        elif self.clock() - self.last_line_at >= PLAIN_LINE_SECS:
            self.line()

    def row(self, row: Mapping[str, Any]) -> None:
        """A metrics row was written: keep its text; show it at once when it carries an evaluation."""
        self.latest = row_text(row)
        if is_evaluated(row):
            self.line()

    def saved(self, step: int, reasons: Sequence[str]) -> None:
        """A checkpoint was committed."""
        self.saved_at, self.saved_step = self.clock(), step

    def line(self) -> None:
        """One plain line: where training is, and the latest numbers."""
        self.last_line_at = self.clock()
        self.console.print(
            f"step {self.step}/{self.stop_step}  {self.latest}  [{self.facts()}]",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    def facts(self) -> str:
        """Throughput, time left, and the age of the last checkpoint."""
        parts = [
            f"{self.images_per_sec:,.0f} img/s" if self.images_per_sec >= 10 else f"{self.images_per_sec:.2f} img/s"
        ]
        left = self.secs_left()
        if left is not None:
            parts.append(f"{duration_text(left)} left")
        if self.saved_at is None:
            parts.append("nothing saved yet in this attempt")
        else:
            parts.append(f"saved step {self.saved_step}, {duration_text(self.clock() - self.saved_at)} ago")
        return " · ".join(parts)

    def secs_left(self) -> float | None:
        """Time left by the pace of this attempt, evaluation and saving included; None before the first step."""
        done = self.step - self.start_step
        if done < 1:
            return None
        return (self.clock() - self.started_at) / done * (self.stop_step - self.step)


def print_facts(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """A title and aligned names with values, for the banner and for where things are.

    Lines are not folded at the console's width, so that commands and paths can be copied.
    """
    width = max(len(name) for name, _ in rows)
    console.print(title, style="bold", markup=False)
    for name, value in rows:
        line = Text.assemble((f"  {name:<{width}}  ", "dim"), value)
        console.print(line, soft_wrap=True)


def print_columns(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns below bold names; lines are not folded."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    for style, cells in (("bold", columns), *(("", row) for row in rows)):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        console.print(Text(line.rstrip(), style), soft_wrap=True)


def evaluation_table(rows: Sequence[tuple[str, str]]) -> Table:
    """What an evaluation measured, a line each."""
    table = Table(show_header=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def results_table(init: Mapping[str, Any], now: Mapping[str, Any]) -> Table:
    """k-NN accuracy of the untrained model, of the present one, and of raw pixels, in percent."""
    table = Table(title="k-NN accuracy, %", title_justify="left", title_style="bold")
    for column in ("", "at initialisation", "now", "raw pixels"):
        table.add_column(column, justify="left" if not column else "right")
    names = {
        "knn_top1": "k = 20",
        "knn5_top1": "k = 5",
        "knn_10shot": "10 labels a class",
        "knn_1shot": "1 label a class",
    }
    for name, label in names.items():
        values = (init.get(f"init_{name}"), now.get(name), init.get(f"pixel_{name}"))
        table.add_row(label, *("–" if value is None else f"{100 * value:.1f}" for value in values))
    return table
