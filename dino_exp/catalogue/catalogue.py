"""The catalogue of an outputs folder: kept up by trainings, checked against the runs by whoever reads it."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dino_exp.catalogue import database
from dino_exp.catalogue.database import FILE_NAME, CatalogueError, View
from dino_exp.catalogue.entry import RUNS, read_entry, stamp_of, stamps
from dino_exp.catalogue.reading import read_runs
from dino_exp.catalogue.rows import RunRows, rows_of
from dino_exp.errors import DinoExpError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import probe

log = logging.getLogger(__name__)

_PATIENCE = 3  # notes that fail, each after having waited for whoever holds the file
_MANY = 100  # runs that take longer to read than people like to wait without being told why


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild has read; `unread` says for each run that could not be read why."""

    num_runs: int
    num_checkpoints: int
    unread: Mapping[str, str]


class Catalogue:
    """The runs in `outputs/runs`; one that lies elsewhere is in no catalogue.

    `say` hears, once, why something takes longer or is not kept.
    """

    def __init__(self, outputs: Path, say: Callable[[str], object] = log.warning) -> None:
        self.outputs, self.path = outputs, outputs / FILE_NAME
        self._say = say
        self._failures = 0  # in a row

    def update(self, directory: Path) -> None:
        """Note what a run's files say now. For trainings: raises nothing, waits for no longer than two seconds.

        What is not noted costs the next reader a look at the run itself. After several failures in a row nothing is
        noted any more, which is told.
        """
        stamp = stamp_of(directory)
        if self._failures == _PATIENCE or stamp is None or directory.parent.name != RUNS:
            return
        try:
            database.write(self.path, rows_of(read_entry(directory, stamp)))
            self._failures = 0
        except (CatalogueError, OSError) as problem:
            self._failures += 1
            if self._failures == _PATIENCE:
                self._say(
                    f"{self.path}: not kept up ({problem}); `dino-exp runs list` reads the runs themselves instead"
                )

    def view(self) -> View:
        """A view of the runs as they are now. Changes nothing; close it. Raises OSError."""
        found = stamps(self.outputs)
        try:
            known = database.known_stamps(self.path)
            trusted = {name for name, stamp in known.items() if name in found and found[name] == stamp}
            others = self._read(found, found.keys() - trusted)
            # Without exceptions the file is taken as it is. With any, a run that is noted just now must not come twice.
            everything = not others and len(trusted) == len(known)
            view = View(self.path, None if everything else trusted, others)
        except FileNotFoundError:
            view = View(None, None, self._read(found, found.keys()))
        except CatalogueError as problem:
            self._say(f"{self.path}: not used ({problem}); reading the runs instead. To mend it: {self._mend()}")
            view = View(None, None, self._read(found, found.keys()))
        running = view.rows("SELECT name FROM runs WHERE state = 'running'")
        view.mark_live(name for (name,) in running if self._is_live(name))
        return view

    def rebuild(self, progress: Callable[[int, int], object], num_processes: int = 1) -> Rebuilt:
        """Read every run and write the file anew, beside trainings too. `progress(done, total)` hears of runs.

        `num_processes` as for `read_runs`. Raises CatalogueError, and then the file is as it was; OSError.
        """
        num_runs, num_checkpoints, unread = 0, 0, dict[str, str]()

        def counted() -> Iterator[RunRows]:
            nonlocal num_runs, num_checkpoints
            for rows in read_runs(self.outputs, stamps(self.outputs), progress, num_processes):
                if rows.problem is None:
                    num_runs += 1
                else:
                    unread[rows.name] = rows.problem
                num_checkpoints += len(rows.checkpoints)
                yield rows

        try:
            database.write_anew(self.path, counted())
        except CatalogueError as problem:
            raise CatalogueError(
                f"{self.path}: not written anew ({problem}); type it again when nobody uses the file, or remove it"
            ) from problem
        return Rebuilt(num_runs, num_checkpoints, unread)

    def _read(self, found: Mapping[str, str], names: Iterable[str]) -> list[RunRows]:
        missing = {name: found[name] for name in names}
        if len(missing) > _MANY:
            self._say(f"reading {len(missing):,} runs; to have this done once: {self._mend()}")
        return list(read_runs(self.outputs, missing))

    def _is_live(self, name: str) -> bool:
        try:
            return probe(RunPaths(self.outputs / RUNS / name), clock=time.time) is not None
        except DinoExpError:  # somebody holds the lock, and who it is cannot be read
            return True

    def _mend(self) -> str:
        return f"dino-exp runs rebuild --outputs {shlex.quote(str(self.outputs))}"
