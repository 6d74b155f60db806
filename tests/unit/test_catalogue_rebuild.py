"""Writing the catalogue anew: beside those who read and note, whatever the file was before."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from catalogue_samples import make

from dino_exp.catalogue import database
from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.catalogue.database import CatalogueError
from dino_exp.catalogue.entry import RunEntry
from dino_exp.catalogue.query import Filter, list_runs
from dino_exp.catalogue.rows import RunRows, rows_of
from dino_exp.errors import DinoExpError


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path, pytest.fail)


def rows(catalogue: Catalogue) -> list[dict[str, object]]:
    with contextlib.closing(catalogue.view()) as view:
        return list_runs(view, Filter())


def test_many_are_read_in_several_processes_and_say_the_same(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(7):
        make(tmp_path, f"r{number}", 0.1 * number, 0.7)
    (make(tmp_path, "x", 0.5) / "run.json").write_bytes(b"{")
    told: list[tuple[int, int]] = []
    alone = catalogue.rebuild(lambda *_: None)
    by_one = rows(catalogue)
    monkeypatch.setattr("dino_exp.catalogue.reading._CHUNK", 3)
    assert catalogue.rebuild(lambda *counts: told.append(counts), num_processes=2) == alone
    assert rows(catalogue) == by_one
    assert told == [(done, 8) for done in range(9)]
    assert (alone.num_runs, alone.num_checkpoints, [name[-1] for name in alone.unread]) == (7, 14, ["x"])


def test_trainings_that_note_meanwhile_meet_no_error_and_lose_nothing(tmp_path: Path) -> None:
    path, stamps, problems = tmp_path / "catalogue.sqlite", dict[str, int](), list[Exception]()

    def rows_now(name: str, stamp: int) -> RunRows:
        """Several pages, all of one age."""
        found = rows_of(RunEntry(name=name, stamp=str(stamp)))
        made = [(name, step, *(None,) * 9, f"{stamp} {'x' * 300}") for step in range(20)]
        return replace(found, checkpoints=made)

    def train(number: int) -> None:
        for stamp in range(80):
            name = f"run{number}-{stamp % 20}"
            stamps[name] = stamp  # what the run's files say; then the catalogue
            try:
                database.write(path, rows_now(name, stamp))
            except CatalogueError as problem:
                problems.append(problem)

    def read() -> Iterator[RunRows]:
        return (rows_now(name, stamp) for name, stamp in list(stamps.items()))

    trainings = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for training in trainings:
        training.start()
    while any(training.is_alive() for training in trainings):
        database.write_anew(path, read())
        assert database.damage(path) is None
    database.write_anew(path, read())
    assert problems == []
    assert database.known_stamps(path) == {name: str(stamp) for name, stamp in stamps.items()}
    with contextlib.closing(sqlite3.connect(path)) as found:
        torn = "SELECT name FROM checkpoints GROUP BY name HAVING count(DISTINCT metrics) > 1 OR count(*) != 20"
        assert found.execute(torn).fetchall() == []
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_is_gone_goes_and_one_noted_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.sqlite"
    old, new, other = (rows_of(RunEntry(name=name, stamp="1")) for name in ("old", "new", "other"))
    database.write(path, old)
    database.write(path, other)
    later = rows_of(RunEntry(name="other", stamp="2"))

    def read() -> Iterator[RunRows]:
        database.write(path, new)
        database.write(path, later)
        yield other

    database.write_anew(path, read())
    assert database.known_stamps(path) == {"new": "1", "other": "2"}


def test_the_file_is_never_exchanged_whatever_it_was(tmp_path: Path) -> None:
    path, run = tmp_path / "catalogue.sqlite", rows_of(RunEntry(name="a", stamp="1"))
    database.write_anew(path, [run])
    whole, place = path.read_bytes(), path.stat().st_ino
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2 :] = b"x" * (len(whole) - len(whole) // 2)
    newer = bytearray(whole)
    newer[60:64] = b"\0\0\0\7"  # where SQLite has the number of the format
    for content in (b"", b"no database", b"SQLite format 3\0" + bytes(5000), bytes(spoilt), bytes(newer)):
        path.write_bytes(content)
        assert database.damage(path) is not None
        database.write_anew(path, [run])
        assert database.damage(path) is None
        assert database.known_stamps(path) == {"a": "1"}
        assert (path.stat().st_ino, list(tmp_path.iterdir())) == (place, [path])


def test_a_rebuild_waits_for_who_holds_the_file_and_says_so(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_exp.catalogue.database.REBUILD_WAIT_SECS", 0.05)
    make(tmp_path, "a", 0.5)
    catalogue.rebuild(lambda *_: None)
    with contextlib.closing(sqlite3.connect(catalogue.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CatalogueError, match=r"catalogue\.sqlite: not written anew \(.*locked\); type it again"):
            catalogue.rebuild(lambda *_: None)
    assert len(rows(catalogue)) == 1


def test_a_reader_that_is_killed_is_told_and_the_file_stays(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        make(tmp_path, f"r{number}", 0.5)
    catalogue.rebuild(lambda *_: None)
    before = catalogue.path.read_bytes()
    monkeypatch.setattr("dino_exp.catalogue.reading._CHUNK", 1)

    def kill_one(done: int, total: int) -> None:
        for process in multiprocessing.active_children()[: done == 0]:
            process.kill()
            process.join()

    with pytest.raises(DinoExpError, match="was killed"):
        catalogue.rebuild(kill_one, num_processes=2)
    assert catalogue.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue.sqlite", "runs"]


PROGRAM = """
import sys, time
from pathlib import Path
from dino_exp.catalogue import reading
from dino_exp.catalogue.catalogue import Catalogue
reading._CHUNK = 1
if __name__ == "__main__":
    def stay(done, total):
        print(done, flush=True)
        time.sleep(100 * (done == 2))
    Catalogue(Path(sys.argv[1])).rebuild(stay, num_processes=2)
"""


def test_no_process_outlives_a_killed_rebuild(tmp_path: Path) -> None:
    for number in range(4):
        make(tmp_path, f"r{number}", 0.5)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, program, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "2\n":
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while someone_is_in_group(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def someone_is_in_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
