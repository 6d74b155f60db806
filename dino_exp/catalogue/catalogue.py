"""The catalogue of an outputs folder: kept up by trainings, checked against the runs by whoever reads it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from dino_exp.catalogue import database
from dino_exp.catalogue.database import FILE_NAME, CatalogueError, View
from dino_exp.catalogue.entry import RUNS, RunEntry, read_entry, stamp_of, stamps
from dino_exp.errors import DinoExpError
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import probe

log = logging.getLogger(__name__)

_MANY = 100  # runs that take longer to read than people like to wait without being told why


class Catalogue:
    """The runs in `outputs/runs`; one that lies elsewhere is in no catalogue.

    `say` hears, once, why something takes longer or is not kept.
    """

    def __init__(self, outputs: Path, say: Callable[[str], object] = log.warning) -> None:
        self.outputs, self.path = outputs, outputs / FILE_NAME
        self._say = say
        self._is_out_of_use = False

    def update(self, directory: Path) -> None:
        """Note what a run's files say now. For trainings: raises nothing, waits for no longer than two seconds.

        What is not noted costs the next reader a look at the run itself.
        """
        stamp = stamp_of(directory)
        if self._is_out_of_use or stamp is None or directory.parent.name != RUNS:
            return
        try:
            database.write(self.path, [read_entry(directory, stamp)])
        except (CatalogueError, OSError) as problem:
            self._is_out_of_use = True
            self._say(f"{self.path}: not kept up ({problem}); `dino-exp runs list` reads the runs themselves instead")

    def view(self) -> View:
        """A view of the runs as they are now. Changes nothing; close it. Raises OSError."""
        found = stamps(self.outputs)
        try:
            known = database.known_stamps(self.path)
            trusted = {name for name, stamp in known.items() if found.get(name) == stamp}
            entries = self._read(found, found.keys() - trusted)
            # Without exceptions the file is taken as it is. With any, a run that is noted just now must not come twice.
            everything = not entries and len(trusted) == len(known)
            view = View(self.path, None if everything else trusted, entries)
        except FileNotFoundError:
            view = View(None, None, self._read(found, found.keys()))
        except CatalogueError as problem:
            self._say(f"{self.path}: not used ({problem}); reading the runs instead. To mend it: {self._mend()}")
            view = View(None, None, self._read(found, found.keys()))
        running = view.rows("SELECT name FROM runs WHERE state = 'running'")
        view.mark_live(name for (name,) in running if self._is_live(name))
        return view

    def rebuild(self, progress: Callable[[int, int], None]) -> list[RunEntry]:
        """Read every run and write the file anew; what was read. `progress(done, total)` hears of runs.

        Raises CatalogueError, OSError.
        """
        found = stamps(self.outputs)
        entries = []
        for done, (name, stamp) in enumerate(sorted(found.items())):
            progress(done, len(found))
            entries.append(read_entry(self.outputs / RUNS / name, stamp))
        progress(len(found), len(found))
        database.write_anew(self.path, entries)
        return entries

    def _read(self, found: dict[str, str], names: Iterable[str]) -> list[RunEntry]:
        missing = sorted(names)
        if len(missing) > _MANY:
            self._say(f"reading {len(missing):,} runs; to have this done once: {self._mend()}")
        return [read_entry(self.outputs / RUNS / name, found[name]) for name in missing]

    def _is_live(self, name: str) -> bool:
        try:
            return probe(RunPaths(self.outputs / RUNS / name), clock=time.time) is not None
        except DinoExpError:  # somebody holds the lock, and who it is cannot be read
            return True

    def _mend(self) -> str:
        return f"dino-exp runs rebuild --outputs {self.outputs}"
