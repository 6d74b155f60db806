"""The catalogue against the runs' own files: whatever state it is in, a view says what is true."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from catalogue_samples import make
from runs_samples import CODE, CODE_HEX, sample_attempt
from support.checkpoints import ToyState as State
from support.checkpoints import open_manager, request

from dino_exp.catalogue import database
from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.catalogue.database import CatalogueError
from dino_exp.catalogue.entry import RunEntry, read_entry
from dino_exp.catalogue.query import Filter, best_groups, best_runs, count_runs, list_runs, problems
from dino_exp.catalogue.rows import rows_of
from dino_exp.checkpoint.pins import pin
from dino_exp.checkpoint.policies import BestN, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import UsageError
from dino_exp.runs.record import load_record, save_record

ALL = Filter()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def catalogue(tmp_path: Path, said: list[str]) -> Catalogue:
    return Catalogue(tmp_path, said.append)


def rows(catalogue: Catalogue, chosen: Filter = ALL, **options: Any) -> list[dict[str, Any]]:
    with contextlib.closing(catalogue.view()) as view:
        return list_runs(view, chosen, **options)


def best(catalogue: Catalogue, chosen: Filter = ALL, **options: Any) -> list[tuple[str, int, float]]:
    given: dict[str, Any] = {"metric": "knn_top1", "mode": "max", **options}
    with contextlib.closing(catalogue.view()) as view:
        found = best_runs(view, chosen, **given)
    return [(row["path"].rpartition("-")[2], row["best"]["step"], row["best"]["value"]) for row in found]


def names(catalogue: Catalogue, **options: Any) -> list[str]:
    return [row["path"].rpartition("-")[2] for row in rows(catalogue, **options)]


def test_without_a_file_the_runs_are_read_and_nothing_is_made(tmp_path: Path, catalogue: Catalogue) -> None:
    assert rows(catalogue) == []
    make(tmp_path, "a", 0.5)
    before = sorted(tmp_path.rglob("*"))
    assert names(catalogue) == ["a"]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_was_noted_is_not_read_again(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(tmp_path, "a", 0.5), make(tmp_path, "b", 0.7)
    for run in (first, second):
        catalogue.update(run)
    expected = rows(catalogue), best(catalogue)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("dino_exp.catalogue.reading.read_entry", lambda *_: pytest.fail("a run was read"))
    assert (rows(catalogue), best(catalogue)) == expected
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # no journal, no lock


def change_record(run: Path) -> None:
    record = load_record(run / "run.json")
    assert record is not None
    save_record(run / "run.json", replace(record, state="completed", step=77))


def save_another(run: Path) -> None:
    open_manager(run / "checkpoints", attempt=2, keep=KeepAny((LatestN(99),))).save(
        State(9), request(9, metrics={"knn_top1": 0.99})
    )


CHANGES = {
    "its record": change_record,
    "a checkpoint more": save_another,
    "a checkpoint less": lambda run: next((run / "checkpoints").glob("step-*2.json")).unlink(),
    "a pin": lambda run: pin(run / "checkpoints", 1, "note"),
    "all of it gone": shutil.rmtree,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_since_is_seen(change: str, tmp_path: Path, catalogue: Catalogue) -> None:
    run = make(tmp_path, "a", 0.5, 0.6)
    make(tmp_path, "b", 0.55)
    catalogue.rebuild(lambda *_: None)
    CHANGES[change](run)
    fresh = Catalogue(tmp_path / "elsewhere", pytest.fail)
    shutil.copytree(tmp_path / "runs", tmp_path / "elsewhere" / "runs")
    assert rows(catalogue) == rows(fresh)
    assert best(catalogue) == best(fresh)


def test_a_removed_catalogue_comes_back_with_the_next_note(tmp_path: Path, catalogue: Catalogue) -> None:
    run = make(tmp_path, "a", 0.5)
    catalogue.rebuild(lambda *_: None)
    catalogue.path.unlink()
    catalogue.update(run)
    assert catalogue.path.is_file()
    assert names(catalogue) == ["a"]


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0" + bytes(5000)])
def test_a_damaged_file_is_said_and_not_believed(
    content: bytes, tmp_path: Path, catalogue: Catalogue, said: list[str]
) -> None:
    run = make(tmp_path, "a", 0.5)
    catalogue.path.write_bytes(content)
    assert names(catalogue) == ["a"]
    assert len(said) == 1
    assert f"dino-exp runs rebuild --outputs {tmp_path}" in said[0]
    catalogue.update(run)
    catalogue.rebuild(lambda *_: None)
    said.clear()
    assert names(catalogue) == ["a"]
    assert said == []


def test_a_changed_byte_anywhere_is_one_message_at_most(tmp_path: Path) -> None:
    """SQLite notices what makes its file unreadable, and no more: see decision 9."""
    for number in range(4):
        make(tmp_path, f"r{number}", 0.1 * number, 0.2 * number)
    said: list[str] = []
    catalogue = Catalogue(tmp_path, said.append)
    catalogue.rebuild(lambda *_: None)
    whole = catalogue.path.read_bytes()
    for at in range(0, len(whole), 37):
        catalogue.path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with contextlib.suppress(CatalogueError):
            assert len(rows(catalogue)) <= 8


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path, catalogue: Catalogue, said: list[str]) -> None:
    run = make(tmp_path, "a", 0.5)
    with contextlib.closing(sqlite3.connect(catalogue.path)) as database:
        database.execute("PRAGMA user_version = 7")
    before = catalogue.path.read_bytes()
    catalogue.update(run)
    assert names(catalogue) == ["a"]
    assert catalogue.path.read_bytes() == before
    assert all("format is 7" in text for text in said)


def test_a_writer_who_holds_the_file_for_long_stops_nobody(
    tmp_path: Path, catalogue: Catalogue, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dino_exp.catalogue.database.WAIT_SECS", 0.05)
    run = make(tmp_path, "a", 0.5)
    catalogue.rebuild(lambda *_: None)
    change_record(run)
    with contextlib.closing(sqlite3.connect(catalogue.path, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        catalogue.update(run)
        catalogue.update(run)
        assert said == []  # the next note may be taken
        catalogue.update(run)
        catalogue.update(run)
        assert len(said) == 1
        assert "locked" in said[0]
        assert rows(catalogue)[0]["step"] == 77
    assert rows(catalogue)[0]["step"] == 77


def test_a_note_that_fails_now_and_then_stops_no_later_one(
    tmp_path: Path, catalogue: Catalogue, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, "a", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(database, "write", lambda *_: (_ for _ in ()).throw(CatalogueError("disk I/O error")))
        catalogue.update(run)
        catalogue.update(run)
    catalogue.update(run)
    assert said == []
    assert list(database.known_stamps(catalogue.path)) == [run.name]


def test_many_who_note_at_once_lose_nothing(tmp_path: Path) -> None:
    runs = [make(tmp_path, f"r{number}", 0.01 * number) for number in range(16)]
    said: list[str] = []
    threads = [threading.Thread(target=Catalogue(tmp_path, said.append).update, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == []
    with contextlib.closing(sqlite3.connect(tmp_path / "catalogue.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (16,)


def test_a_run_that_is_noted_while_somebody_reads_comes_once(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.update(make(tmp_path, "a", 0.5))
    make(tmp_path, "b", 0.7)

    def read_and_note(directory: Path, stamp: str) -> RunEntry:
        """A training notes the run just after the reader has looked at what is noted."""
        entry = read_entry(directory, stamp)
        database.write(catalogue.path, rows_of(entry))
        return entry

    monkeypatch.setattr("dino_exp.catalogue.reading.read_entry", read_and_note)
    assert sorted(names(catalogue)) == ["a", "b"]


def test_a_run_elsewhere_is_in_no_catalogue(tmp_path: Path, catalogue: Catalogue) -> None:
    run = make(tmp_path, "a", 0.5)
    run = run.rename(tmp_path / "mine")
    catalogue.update(run)
    assert not catalogue.path.exists()


def test_an_unreadable_record_is_told_and_hides_no_other(tmp_path: Path, catalogue: Catalogue) -> None:
    (make(tmp_path, "a", 0.5) / "run.json").write_bytes(b"{")
    (make(tmp_path, "b", 0.6) / "config.canonical.json").unlink()
    for _ in range(2):
        assert names(catalogue) == ["b"]
        with contextlib.closing(catalogue.view()) as view:
            assert [name.rpartition("-")[2] for name in problems(view)] == ["a", "b"]
        catalogue.rebuild(lambda *_: None)


def test_running_is_shown_only_for_a_live_owner(tmp_path: Path, catalogue: Catalogue) -> None:
    make(tmp_path, "a", 0.5, state="running")
    assert [row["state"] for row in rows(catalogue)] == ["interrupted"]
    assert names(catalogue, chosen=Filter.parse([], ["interrupted"], [])) == ["a"]
    assert names(catalogue, chosen=Filter.parse([], ["running"], [])) == []


def test_filters(tmp_path: Path, catalogue: Catalogue) -> None:
    make(tmp_path, "a", 0.5, seed=1, tags=("paper", "x'y"))
    make(tmp_path, "b", 0.6, seed=2, state="failed")
    catalogue.rebuild(lambda *_: None)

    def chosen(where: list[str] = [], states: list[str] = [], tags: list[str] = []) -> list[str]:  # noqa: B006
        found = Filter.parse(where, states, tags)
        with contextlib.closing(catalogue.view()) as view:
            assert count_runs(view, found) == len(list_runs(view, found))
        return names(catalogue, chosen=found, sort="key")

    assert chosen(["model=vit_nano"]) == ["a", "b"]
    assert chosen(["model=vit_s"]) == []
    assert chosen(["optimizer.lr=1e-3", "seed=2"]) == ["b"]
    assert chosen(["train.epochs=4"]) == ["a"]
    assert chosen(["init.scheme=null"]) == ["a", "b"]
    assert chosen(["train.accumulate=1"]) == ["a", "b"]  # which the hash, and so the file, leaves out
    assert chosen(["train.accumulate=2"]) == []
    for spelling in ("[0.65,1.0]", "[0.65, 1]", "[65e-2,1]"):
        assert chosen([f"augment.global_area={spelling}"]) == ["a", "b"]
    assert chosen(["augment.global_area=[0.65]"]) == []
    for odd in ("2020-01-01", ".nan", "!!set {1}", "[1, 2020-01-01]", "9" * 400, "", "true", "false"):
        assert chosen([f"seed={odd}"]) == []
    for broken in ("2020-99-01", "[1", "!!python/name:os.system x", '!!int ""', "!!bool x", "[" * 2000):
        with pytest.raises(UsageError, match="the value is no YAML"):
            chosen([f"seed={broken}"])
    assert chosen(states=["failed", "completed"]) == ["b"]
    assert chosen(tags=["x'y"]) == ["a"]
    for where, says in (("optimizer.lrr=1", "did you mean optimizer.lr"), ("seed", "expected <setting>=<value>")):
        with pytest.raises(UsageError, match=says):
            chosen([where])
    with pytest.raises(UsageError, match="expected one of running"):
        chosen(states=["dead"])
    with pytest.raises(UsageError, match="no UTF-8"):
        chosen(tags=["\udcff"])
    with pytest.raises(UsageError, match="no UTF-8"):
        best(catalogue, metric="\udcff")


def test_order_and_limit(tmp_path: Path, catalogue: Catalogue) -> None:
    for variant, day, loss in (("a", 3, 0.1), ("b", 1, 0.3), ("c", 2, math.nan)):
        attempts = (sample_attempt(started_at=f"2026-01-0{day}T00:00:00Z"),)
        make(tmp_path, variant, attempts=attempts, metrics={"loss": loss}, step=day)
    assert names(catalogue) == ["a", "c", "b"]
    assert names(catalogue, sort="key") == ["a", "b", "c"]
    assert names(catalogue, sort="step", limit=1) == ["a"]
    assert len(names(catalogue, limit=10**30)) == 3
    assert names(catalogue, sort="loss") == ["b", "a", "c"]
    for metric in ("knn_top1", 'lo"ss', "$", ""):
        with pytest.raises(UsageError, match="expected started, step, key, loss"):
            names(catalogue, sort=metric)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_of_equals_it_is_the_earlier_as_retention_has_it(tmp_path: Path, catalogue: Catalogue, mode: str) -> None:
    run = make(tmp_path, "a", 0.5, 0.9, 0.9, 0.5)
    infos = CheckpointReader(run / "checkpoints").infos()
    kept = BestN("knn_top1", mode).rank(infos)[0]
    assert best(catalogue, mode=mode) == [("a", kept.step, kept.metrics["knn_top1"])]


def test_the_best_is_healthy_finite_and_there(tmp_path: Path, catalogue: Catalogue) -> None:
    make(tmp_path, "a", 0.5, 0.9, 0.7)
    make(tmp_path, "b", 0.8, math.nan, 0.8)
    make(tmp_path, "c", 0.99, healthy=False)
    make(tmp_path, "d")
    for _ in range(2):
        assert best(catalogue) == [("a", 2, 0.9), ("b", 1, 0.8)]
        assert best(catalogue, metric="loss", mode="min") == [
            ("a", 2, pytest.approx(0.1)),
            ("b", 1, pytest.approx(0.2)),
        ]
        assert best(catalogue, limit=1) == [("a", 2, 0.9)]
        assert best(catalogue, commit="f" * 7) == best(catalogue)
        assert best(catalogue, commit="0") == best(catalogue, commit="*") == []
        with pytest.raises(UsageError, match="no checkpoint has it; there are knn_top1, loss"):
            best(catalogue, metric="nix")
        catalogue.rebuild(lambda *_: None)


def test_a_seed_counts_once_and_other_code_apart(tmp_path: Path, catalogue: Catalogue) -> None:
    for variant, value, code in (
        ("a", 0.5, CODE),
        ("again", 0.7, CODE),
        ("b", 0.9, replace(CODE, id=CODE_HEX[:8] + "0" * 56)),
    ):
        make(tmp_path, variant, value, seed=0, code=code)
    with contextlib.closing(catalogue.view()) as view:
        groups = best_groups(view, ALL, metric="knn_top1", mode="max")
    assert [(group["mean"], group["seeds"]) for group in groups] == [(0.9, [0]), (0.7, [0])]


def test_settings_that_come_later_are_seen(tmp_path: Path, catalogue: Catalogue) -> None:
    canonical = make(tmp_path, "a", 0.5) / "config.canonical.json"
    canonical.rename(tmp_path / "aside")
    catalogue.rebuild(lambda *_: None)
    assert names(catalogue, chosen=Filter.parse(["seed=0"], [], [])) == []
    (tmp_path / "aside").rename(canonical)
    assert names(catalogue, chosen=Filter.parse(["seed=0"], [], [])) == ["a"]


def test_a_name_that_no_text_can_hold_hides_nothing(tmp_path: Path, catalogue: Catalogue) -> None:
    run = make(tmp_path, "a", 0.5)
    shutil.copytree(os.fsencode(run), os.fsencode(run.parent) + b"/old\xff")
    for _ in range(2):
        assert names(catalogue) == ["a"]
        assert catalogue.rebuild(lambda *_: None).num_runs == 1


def test_groups_average_over_seeds(tmp_path: Path, catalogue: Catalogue) -> None:
    other = replace(CODE, id=CODE_HEX)
    for seed, value in enumerate((0.5, 0.7, 0.6)):
        make(tmp_path, f"s{seed}", value, seed=seed, code=other)
    make(tmp_path, "alone", 0.65, group_hash="g1:" + "12" * 32)
    with contextlib.closing(catalogue.view()) as view:
        groups = best_groups(view, ALL, metric="knn_top1", mode="max")
    assert [len(group["runs"]) for group in groups] == [1, 3]
    assert groups[1]["mean"] == pytest.approx(0.6)
    assert groups[1]["std"] == pytest.approx(0.1)
    assert (groups[1]["min"], groups[1]["max"], groups[0]["std"]) == (0.5, 0.7, None)
    assert groups[1]["seeds"] == [1, 2, 0]  # as their runs: the best first
    assert "seed" not in groups[1]["settings"]
