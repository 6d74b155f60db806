"""A bar on standard error while bytes are read or sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from dino_exp.cli.show import plain

_TELL_BYTES = 1 << 20


class Bar:
    """Counts bytes done of the bytes to be expected, and shows them now and then: showing costs more than checking."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._total = self._done = self._told = 0

    def expect(self, num_bytes: int) -> None:
        """So many more are to come."""
        self._total += num_bytes
        self._bar.update(self._task, total=self._total)

    def heard(self, num_bytes: int) -> None:
        """So many more are done."""
        self.reached(self._done + num_bytes)

    def reached(self, done: int) -> None:
        """So many are done in all."""
        self._done = done
        if done - self._told >= _TELL_BYTES or done >= self._total:
            self._told = done
            self._bar.update(self._task, completed=min(done, self._total))

    def say(self, text: str) -> None:
        """A line on standard error, above the bar."""
        self._bar.console.print(Text(plain(text)), soft_wrap=True)


@contextlib.contextmanager
def progress(word: str, *, quiet: bool) -> Iterator[Bar]:
    """The bar, for eyes only: it is shown on a terminal, and nothing of it stays. `quiet`: it is not shown."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn(word), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        yield Bar(bar, bar.add_task(word, total=0))
