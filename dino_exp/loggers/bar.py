"""A bar on standard error for work of minutes; for eyes only, so that nothing of it shows elsewhere or stays."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class WorkBar:
    """Shows how far one piece of work after the other is. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        console = Console(stderr=True, highlight=False) if console is None else console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task: TaskID | None = None
        self._word = ""

    def tell(self, word: str, done: int, total: int | None) -> None:
        """`done` of `total` (None: not known) of the work called `word` are done; another word begins another bar."""
        if word != self._word or self._task is None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._word = self._bar.add_task(word, total=total), word
        self._bar.update(self._task, completed=done, total=total)

    def __enter__(self) -> Self:
        """Begin to show."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away."""
        self._bar.stop()
