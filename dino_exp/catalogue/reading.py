"""Reading many runs at once."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

from dino_exp.catalogue.entry import RUNS, read_entry
from dino_exp.catalogue.rows import RunRows, rows_of
from dino_exp.errors import DinoExpError

_CHUNK = 50  # runs that a process is given at once


def read_runs(
    outputs: Path,
    stamps: Mapping[str, str],
    progress: Callable[[int, int], object] = lambda *_: None,
    num_processes: int = 1,
) -> Iterator[RunRows]:
    """What the files of runs say now, by name. `stamps` were taken before; `progress(done, total)` hears of runs.

    More than one process is for programs whose main module may be imported (see `multiprocessing`), and is used only
    where it is worth their start. Raises DinoExpError if one of them is killed.
    """
    total, read = len(stamps), partial(_read, str(outputs / RUNS))
    ordered = sorted(stamps.items())
    num_processes = min(num_processes, total // _CHUNK)
    if num_processes < 2:
        yield from _counted(map(read, ordered), total, progress)
        return
    # Started afresh, not forked: who calls this may have threads, of a progress bar for one.
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _serve_one_master) as pool:
        try:
            yield from _counted(pool.map(read, ordered, chunksize=_CHUNK), total, progress)
        except BrokenProcessPool as problem:
            raise DinoExpError("a process that read runs was killed (for want of memory?); type it again") from problem
        finally:
            pool.shutdown(cancel_futures=True)


def _read(runs: str, named: tuple[str, str]) -> RunRows:
    name, stamp = named
    return rows_of(read_entry(Path(runs, name), stamp))


def _counted(found: Iterator[RunRows], total: int, progress: Callable[[int, int], object]) -> Iterator[RunRows]:
    for done, rows in enumerate(found):
        progress(done, total)
        yield rows
    progress(total, total)


def _serve_one_master() -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the one that started this; end when it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    gone = parent.sentinel

    def end_with_it() -> None:
        multiprocessing.connection.wait([gone])
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()
