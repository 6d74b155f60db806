"""The catalogue's file: SQLite with a rollback journal, so that a reader leaves nothing behind.

The only module that knows SQLite. Many processes may write; each holds the file for about a millisecond. Nothing is
synced: what a power loss may leave of a derived file is worth less than the 12 ms that syncing takes, and a run's
stamp lies in the same row as what it vouches for.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dino_exp.catalogue.rows import RunRows
from dino_exp.errors import DinoExpError, UsageError

FILE_NAME = "catalogue.sqlite"
WAIT_SECS = 2.0  # for another writer, who holds the file for milliseconds
REBUILD_WAIT_SECS = 30.0  # somebody sits before it, and wants it done

_TABLES = """
CREATE TABLE {schema}.runs (
    name TEXT PRIMARY KEY, stamp TEXT NOT NULL, problem TEXT,
    state TEXT, started_at TEXT, step INTEGER, config_hash TEXT, group_hash TEXT, git_commit TEXT, code_id TEXT,
    run_key TEXT, parent_key TEXT, secs_per_step REAL, horizon INTEGER, seed, tags TEXT, settings TEXT, doc TEXT
) WITHOUT ROWID;
CREATE TABLE {schema}.bests (
    name TEXT, metric TEXT, code_id TEXT, git_commit TEXT, git_dirty INTEGER,
    highest REAL, highest_step INTEGER, lowest REAL, lowest_step INTEGER -- of equals the earlier step
);
CREATE INDEX {schema}.bests_by_metric ON bests (metric, name);
CREATE INDEX {schema}.bests_by_run ON bests (name);
CREATE TABLE {schema}.checkpoints (
    name TEXT, step INTEGER, epoch INTEGER, created_at TEXT, bytes INTEGER, healthy INTEGER, resumable INTEGER,
    config_hash TEXT, git_commit TEXT, code_id TEXT, state_digest TEXT, metrics TEXT,
    PRIMARY KEY (name, step)
) WITHOUT ROWID;
"""
FORMAT = zlib.crc32(_TABLES.encode()) >> 1  # other tables, or remarks in them, are another format; SQLite keeps 31 bits
_SHOWN_STATE = "CASE WHEN state = 'running' AND name NOT IN (SELECT name FROM live) THEN 'interrupted' ELSE state END"
_ALL = ("runs", "bests", "checkpoints")


class CatalogueError(DinoExpError):
    """The catalogue cannot be used: damaged, of another version, or on a disk that cannot lock. The runs can."""


@contextlib.contextmanager
def told() -> Iterator[None]:
    """SQLite's errors as ours, and what a changed byte makes of a text."""
    try:
        yield
    except (sqlite3.Error, ValueError) as problem:
        raise CatalogueError(str(problem)) from problem


class View:
    """A connection in which `runs`, `bests` and `checkpoints` hold what is true now.

    Rows of `path` count for the runs in `trusted` only; those of `others` are laid beside them in memory.
    """

    def __init__(self, path: Path | None, trusted: Iterable[str] | None, others: Iterable[RunRows]) -> None:
        with told():
            self._database = sqlite3.connect("file::memory:", uri=True, isolation_level=None)
            _make_tables(self._database, "main")
            for name in _ALL:
                self._database.execute(f"ALTER TABLE {name} RENAME TO own_{name}")
            _insert(self._database, others, prefix="own_")
            self._database.execute("CREATE TEMP TABLE live (name TEXT PRIMARY KEY) WITHOUT ROWID")
            if path is not None:
                self._database.execute("ATTACH ? AS shared", (_read_only(path),))
            some = "" if trusted is None else "WHERE name IN (SELECT name FROM trusted)"
            if trusted is not None:
                self._database.execute("CREATE TEMP TABLE trusted (name TEXT PRIMARY KEY) WITHOUT ROWID")
                self._database.executemany("INSERT INTO trusted VALUES (?)", ((name,) for name in trusted))
            for name in _ALL:
                shown = f", {_SHOWN_STATE} AS shown_state" if name == "runs" else ""
                shared = "" if path is None else f"SELECT *{shown} FROM shared.{name} {some} UNION ALL "
                self._database.execute(f"CREATE TEMP VIEW {name} AS {shared}SELECT *{shown} FROM own_{name}")

    def mark_live(self, names: Iterable[str]) -> None:
        """Say which runs somebody works on: of the others that say `running`, `shown_state` is interrupted."""
        with told():
            self._database.executemany("INSERT INTO live VALUES (?)", ((name,) for name in names))

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """What a query of ours selects.

        Raises CatalogueError for a file in which bytes have changed, UsageError for a value that is no text.
        """
        try:
            with told():
                return self._database.execute(query, values).fetchall()
        except CatalogueError as problem:
            if isinstance(problem.__cause__, UnicodeEncodeError):
                raise UsageError(f"{problem.__cause__.object!r}: bytes that are no UTF-8, expected text") from problem
            problem.add_note("The catalogue is damaged; to write it anew: dino-exp runs rebuild")
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()


def known_stamps(path: Path) -> dict[str, str | None]:
    """The stamp of every run that the file knows; none of one that could not be read whole, which is to be tried again.

    Raises CatalogueError, FileNotFoundError; creates nothing.
    """
    if not path.is_file():
        raise FileNotFoundError(path)
    with told(), contextlib.closing(sqlite3.connect(_read_only(path), uri=True, timeout=WAIT_SECS)) as database:
        _check_format(database)
        return dict(database.execute("SELECT name, CASE WHEN problem IS NULL THEN stamp END FROM runs"))


def write(path: Path, rows: RunRows) -> None:
    """Put a run in, in place of what was known of it: all or nothing.

    Raises CatalogueError; nobody waits longer than WAIT_SECS for another writer.
    """
    with _writing(path) as database:
        for table in _ALL:
            database.execute(f"DELETE FROM {table} WHERE name = ?", (rows.name,))
        _insert(database, [rows])


def write_anew(path: Path, runs: Iterable[RunRows]) -> None:
    """Let the file, whatever it is, hold these runs and what others note meanwhile, and no other run.

    Everybody may go on reading and writing: the rows change places at the end, in one transaction. The file itself is
    never exchanged, since SQLite finds a journal by its name: a writer who still holds the old file would take the
    journal of the new one for its own. Raises CatalogueError, OSError.
    """
    if damage(path) is not None:
        _empty(path)
    before = _noted(path)  # before the first run is read
    with told(), contextlib.closing(sqlite3.connect("", isolation_level=None, timeout=REBUILD_WAIT_SECS)) as database:
        database.execute("PRAGMA journal_mode = OFF")  # of this database, a file without a name that goes with us
        _make_tables(database, "main")
        database.execute("BEGIN")
        _insert(database, runs)
        database.execute("COMMIT")
        database.execute("ATTACH ? AS shared", (str(path),))
        with _transaction(database, "shared"):
            _keep_noted(database, before)
            for table in _ALL:
                database.execute(f"DELETE FROM shared.{table}")
                database.execute(f"INSERT INTO shared.{table} SELECT * FROM main.{table}")


def _keep_noted(database: sqlite3.Connection, before: set[tuple[str, str]]) -> None:
    """Take what was noted in `shared` since it held `before`, which may be newer than what was read."""
    found = database.execute("SELECT name, stamp FROM shared.runs")
    noted = [(name,) for name, stamp in found if (name, stamp) not in before]
    for table in _ALL:
        database.executemany(f"DELETE FROM main.{table} WHERE name = ?", noted)
        database.executemany(f"INSERT INTO main.{table} SELECT * FROM shared.{table} WHERE name = ?", noted)


def _noted(path: Path) -> set[tuple[str, str]]:
    if not path.is_file():
        return set()
    with told(), contextlib.closing(sqlite3.connect(_read_only(path), uri=True, timeout=REBUILD_WAIT_SECS)) as database:
        return set(database.execute("SELECT name, stamp FROM runs"))


def _empty(path: Path) -> None:
    """Make an empty catalogue of a file that cannot be used."""
    with told(), contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=REBUILD_WAIT_SECS)) as database:
        try:
            database.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError:
            pass  # it is no database, so nobody can be writing to it
        os.truncate(path, 0)
    with _writing(path):
        pass


def damage(path: Path) -> str | None:
    """What SQLite finds wrong with the file; None for nothing, and where there is none."""
    try:
        known_stamps(path)
        with told(), contextlib.closing(sqlite3.connect(_read_only(path), uri=True)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            return None if found == "ok" else str(found)
    except FileNotFoundError:
        return None
    except CatalogueError as problem:
        return str(problem)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[sqlite3.Connection]:
    with (
        told(),
        contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=WAIT_SECS)) as database,
        _transaction(database, "main"),
    ):
        yield database


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection, schema: str) -> Iterator[None]:
    """All or nothing in a catalogue that a connection has open as `schema`; in an empty file its tables are made."""
    database.execute(f"PRAGMA {schema}.synchronous = OFF")
    database.execute("BEGIN IMMEDIATE")
    try:
        if database.execute(f"PRAGMA {schema}.user_version").fetchone() == (0,):
            _make_tables(database, schema)
            database.execute(f"PRAGMA {schema}.user_version = {FORMAT}")
        _check_format(database, schema)
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _make_tables(database: sqlite3.Connection, schema: str) -> None:
    for statement in _TABLES.format(schema=schema).split(";")[:-1]:
        database.execute(statement)


def _check_format(database: sqlite3.Connection, schema: str = "main") -> None:
    (found,) = database.execute(f"PRAGMA {schema}.user_version").fetchone()
    if found != FORMAT:
        raise CatalogueError(f"its format is {found}, this version reads {FORMAT}")


def _read_only(path: Path) -> str:
    return f"file:{urllib.parse.quote(os.path.abspath(path))}?mode=ro"  # noqa: PTH100  # no symbolic link is resolved


def _insert(database: sqlite3.Connection, runs: Iterable[RunRows], prefix: str = "") -> None:
    for rows in runs:
        for table, values in zip(_ALL, ([rows.run], rows.bests, rows.checkpoints), strict=True):
            if values:
                marks = ", ".join("?" * len(values[0]))
                database.executemany(f"INSERT INTO {prefix}{table} VALUES ({marks})", values)
