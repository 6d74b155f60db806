"""What to do next: after damage that no look at the list shows, and with a run that did not come back whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from backup_samples import save_with_rows, stored, with_logs
from cli_samples import KEEP, cli, make_run
from runs_samples import sample_record
from support.backups import fetch, send, target_of
from support.checkpoints import flip, save_steps
from support.disks import mount, unmount

from dino_exp.backup.plan import Remote
from dino_exp.errors import RefusedError
from dino_exp.runs.record import RunRecord, load_record, save_record

HORIZON = sample_record().schedule.horizon_steps


def rot(path: Path) -> None:
    """Other content, of the same size and time."""
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_what_rotted_without_a_trace_is_mended_by_reading_all_again(tmp_path: Path) -> None:
    run, there = with_logs(make_run(tmp_path, 1, 2, 3)), tmp_path / "there"
    send(run, there)
    for pattern in ("step-000000002.a001*", "train.*.log"):
        rot(stored(there, pattern))
    back = cli("restore", there, tmp_path / "back")
    assert back.code == 4
    assert any(f"dino-exp checkpoints backup <run> {there} --reread" in line for line in back.lines)
    assert cli("backup", run, there).code == 0  # it looks at the list only
    done = cli("backup", run, there, "--reread", "--json")
    assert (done.code, done.json["sent"], len(done.json["spoiled"])) == (4, [2], 2)
    again = cli("backup", run, there, "--reread", "--json")
    assert (again.code, again.json["sent"], again.json["spoiled"]) == (0, [], [])
    assert not fetch(there, tmp_path / "whole").left_out


@pytest.mark.parametrize("first", [True, False])
def test_of_two_copies_at_once_the_later_one_gives_way_and_goes_on(tmp_path: Path, first: bool) -> None:
    """On two machines, where no lock keeps them apart: the other begins and ends before this one commits."""
    run, there, other = make_run(tmp_path, 1), tmp_path / "there", tmp_path / "copy" / "run"
    if not first:
        send(run, there)
    shutil.copytree(run, other)
    save_steps(run / "checkpoints", [2], keep=KEEP)
    for folder in (run, other):
        (folder / "train.log").write_text(str(folder))
    target = target_of(there)
    listing = target.listing

    def meanwhile() -> dict[str, Remote]:
        found = listing()
        send(other, there)
        return found

    target.listing = meanwhile  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="another backup was committed since this one began"):
        send(run, there, target=target)
    fetch(there, tmp_path / "back")
    assert (tmp_path / "back" / "train.log").read_text() == str(other)
    assert send(run, there).steps == (1, 2)
    assert fetch(there, tmp_path / "again").left_out == ()


def test_a_run_that_comes_to_its_end_meanwhile_travels_with_its_last_checkpoint(tmp_path: Path) -> None:
    """Its record travels after the checkpoints: alone it would say that nothing is left to do."""
    run, there = make_run(tmp_path, 1), tmp_path / "there"
    target, reached = target_of(there), list[str]()
    send_to_target = target.send

    def meanwhile(path: str, blocks: Callable[[], Iterable[bytes]]) -> None:
        if not reached:
            save_steps(run / "checkpoints", [HORIZON], keep=KEEP)
            save_record(run / "run.json", replace(load(run), state="completed"))
        reached.append(path)
        send_to_target(path, blocks)

    target.send = meanwhile  # type: ignore[method-assign]
    done = send(run, there, target=target)
    assert (done.steps, done.sent_steps, done.left_out) == ((1, HORIZON), (1, HORIZON), ())
    fetch(there, tmp_path / "back")
    assert (tmp_path / "back" / "checkpoints" / f"step-{HORIZON:09d}.json").exists()
    assert load(tmp_path / "back").state == "completed"


def load(run: Path) -> RunRecord:
    record = load_record(run / "run.json")
    assert record is not None
    return record


def restored(tmp_path: Path, state: str, *harmed: str) -> list[str]:
    """The last lines that `restore` prints of a run of two checkpoints, of which the later needs the second row."""
    run, there = make_run(tmp_path, state=state), tmp_path / "there"
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "config.yaml").write_text("seed: 0")
    save_with_rows(run, 1, num_bytes=12)
    save_with_rows(run, 2, num_bytes=24)
    send(run, there)
    for pattern in harmed:
        rot(stored(there, pattern))
    return [line.strip() for line in cli("restore", there, tmp_path / "back").lines[-2:]]


@pytest.mark.parametrize("newest", ["good", "damaged"])
def test_a_finished_run_goes_on_as_a_new_one(tmp_path: Path, newest: str) -> None:
    step, harmed = (2, ()) if newest == "good" else (1, ("step-000000002.a001*",))
    line, _ = restored(tmp_path, "completed", *harmed)
    assert line.startswith(f"next: python -m dino_exp.train fork={tmp_path / 'back'}@{step}   #")


def test_one_that_has_all_its_steps_goes_on_if_there_are_to_be_more(tmp_path: Path) -> None:
    run, there = make_run(tmp_path, HORIZON, state="completed"), tmp_path / "there"
    send(run, there)
    line = cli("restore", there, tmp_path / "back").lines[1]
    assert f"fork={tmp_path / 'back'}@{HORIZON} train.epochs=<more>   #" in line


def test_a_stopped_run_goes_on_from_an_older_checkpoint(tmp_path: Path) -> None:
    line, _ = restored(tmp_path, "stopped", "step-000000002.a001*")
    assert line == f"next: python -m dino_exp.train resume={tmp_path / 'back'}"


def test_a_run_without_its_rows_goes_on_as_a_new_one(tmp_path: Path) -> None:
    line, _ = restored(tmp_path, "stopped", "metrics.*.jsonl")
    assert "fork=" in line
    assert "metrics.jsonl lacks rows" in line


def test_a_run_without_its_settings_is_only_looked_at(tmp_path: Path) -> None:
    _, line = restored(tmp_path, "stopped", "config.*.yaml")
    assert line.startswith("next: dino-exp checkpoints list ")


def test_a_restore_refuses_at_once_where_it_could_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send(make_run(tmp_path, 1, 2), tmp_path / "there")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    told = cli("restore", tmp_path / "there", ".")
    assert (told.code, "the current directory" in told.err, "/here/run" in told.err) == (3, True, True)
    mount(tmp_path / "disk", 4_000_000)
    try:
        told = cli("restore", tmp_path / "there", tmp_path / "disk")
        assert (told.code, "a file system is mounted" in told.err) == (3, True)
        assert cli("restore", tmp_path / "there", tmp_path / "disk" / "run").code == 0
    finally:
        unmount(tmp_path / "disk")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("link", ["run", ""])
def test_a_restore_follows_no_link_that_somebody_has_laid(tmp_path: Path, link: str) -> None:
    send(make_run(tmp_path, 1, 2), tmp_path / "there")
    victim, hidden = tmp_path / "victim", tmp_path / ".back.restoring"
    (victim / "run").mkdir(parents=True)
    (victim / "precious").write_text("mine")
    if link:
        hidden.mkdir()
    (hidden / link).symlink_to(victim)
    assert cli("restore", tmp_path / "there", tmp_path / "back").code == 3
    assert [path.name for path in sorted(victim.iterdir())] == ["precious", "run"]
    assert not (tmp_path / "back").exists()
