"""`dino-exp checkpoints backup|restore` on folders and on fsspec's memory, in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from backup_samples import LOGS, copied, save_with_rows, thin, with_logs
from cli_samples import KEEP, cli, contents, make_run
from runs_samples import sample_attempt, sample_record
from support.backups import fetch, send, with_faults
from support.checkpoints import Died, ToyState, flip, open_manager, pack_of, save_steps

from dino_exp.backup.index import parse_index
from dino_exp.backup.source import only_one
from dino_exp.checkpoint.canonical import seal
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.pins import pin
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.owning import own
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import save_record


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return with_logs(make_run(tmp_path, 1, 2, 3))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "far" / "away") if request.param == "folder" else f"memory://{uuid4().hex}"


def test_a_run_comes_back_as_it_was(run: Path, url: str, tmp_path: Path) -> None:
    pin(run / "checkpoints", 1, "for the paper")
    done = cli("backup", run, url, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["checkpoints"] == done.json["sent"] == [1, 2, 3]
    assert done.json["verified"] is True
    before = copied(run)
    back = cli("restore", url, tmp_path / "back", "--json")
    assert (back.code, back.err) == (0, "")
    after = copied(tmp_path / "back")
    assert after.pop("events.jsonl", None) is None  # its row was written when all was done
    assert after == {name: data for name, data in before.items() if name != "events.jsonl"}
    assert back.json["checkpoints"] == [1, 2, 3]
    assert back.json["files"] == done.json["files"] == len(after)
    assert back.json["bytes_fetched"] == sum(map(len, after.values()))
    assert CheckpointReader(tmp_path / "back" / "checkpoints").verify()["ok"]
    assert open_manager(tmp_path / "back" / "checkpoints", keep=KEEP).restore(ToyState()).manifest.step == 3
    assert not list(tmp_path.glob(".*restoring"))


def test_it_tells_in_a_sentence(run: Path, there: Path, tmp_path: Path) -> None:
    done = cli("backup", run, there)
    assert done.out.startswith(f"backed up {run.name} to {there}: 3 checkpoints (3 sent), 10 files; ")
    assert done.out.endswith(" sent and read back, 0 B were there\n")
    back = cli("restore", there, tmp_path / "back")
    assert back.lines[0].startswith(f"restored {run.name} from {there}: 3 checkpoints, 10 files, every byte checked; ")
    assert back.lines[1] == f"  next: python -m dino_exp.train resume={tmp_path / 'back'}"


def test_a_second_backup_sends_what_is_new_and_a_third_nothing(run: Path, url: str) -> None:
    send(run, url)
    save_steps(run / "checkpoints", [4], keep=KEEP)
    target = with_faults(url, 0, Died, once=True)
    done = send(run, url, target=target)
    new = [pack_of(run / "checkpoints", 4), run / "checkpoints" / "step-000000004.json"]
    sizes = sum(path.stat().st_size for path in new)
    index = len(target.read_small("backup.json", 1 << 20))
    if url.startswith("memory"):
        assert target._fs.bytes_written == done.bytes_sent
    assert (done.sent_steps, done.bytes_sent) == ((4,), sizes + index)
    again = send(run, url)
    assert (again.sent_steps, again.bytes_sent) == ((), 0)
    assert again.bytes_skipped == done.bytes_skipped + sizes


def test_the_event_is_recorded_once_and_comes_to_rest(run: Path, there: Path) -> None:
    cli("backup", run, there)
    (row,) = read_lines(run / "events.jsonl")
    assert (row["kind"], row["url"], row["sent"], row["pruned"]) == ("backed_up", str(there), [1, 2, 3], [])
    sent = [cli("backup", run, there, "--json").json["bytes_sent"] for _ in range(2)]
    assert sent[0] > 0  # the row
    assert sent[1] == 0
    assert len(list(read_lines(run / "events.jsonl"))) == 1


def test_a_run_in_use_is_backed_up_and_not_written_to(run: Path, there: Path) -> None:
    with own(RunPaths(run), ""):
        before = contents(run)
        assert cli("backup", run, there, "--json").json["checkpoints"] == [1, 2, 3]
        assert contents(run) == before


def test_what_belongs_to_this_machine_stays_here(run: Path, there: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "quarantine" / "step-000000009.q001").mkdir()
    (run / "checkpoints" / "quarantine" / "step-000000009.q001" / "reason.json").write_text("{}")
    (run / ".run.json.tmp").write_text("torn")
    (run / "code").symlink_to(tmp_path)
    os.mkfifo(run / "pipe")
    with own(RunPaths(run), ""):
        done = cli("backup", run, there, "--json")
    assert done.code == 0
    assert {item["file"] for item in done.json["left_out"]} == {"code", "pipe"}
    names = {path.name.partition(".")[0] for path in there.rglob("*")}
    assert not names & {"lock", "owner", "registry", "reason", "pins"}


def test_logs_are_copied_to_their_last_whole_row(run: Path, there: Path, tmp_path: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    cli("backup", run, there)
    cli("restore", there, tmp_path / "back")
    assert (tmp_path / "back" / "metrics.jsonl").read_text() == LOGS["metrics.jsonl"]


def test_dropped_checkpoints_stay_there_until_pruned(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    cli("prune", run, "--keep-last", 1, "--keep-best", 0)
    left = CheckpointReader(run / "checkpoints").steps()
    assert left == [2, 3]
    done = cli("backup", run, there)
    assert "3 checkpoints (0 sent, 1 that the run has dropped)" in done.out
    assert fetch(there, tmp_path / "all").steps == (1, 2, 3)
    pruned = cli("backup", run, there, "--prune", "--json").json
    assert (pruned["checkpoints"], pruned["pruned"]) == ([2, 3], [1])
    assert fetch(there, tmp_path / "few").steps == (2, 3)
    assert not list(there.rglob("step-000000001*"))
    assert cli("backup", run, there, "--prune", "--json").json["bytes_sent"] > 0  # the row about the pruning
    assert cli("backup", run, there, "--prune", "--json").json["bytes_sent"] == 0


def test_nothing_is_pruned_on_the_word_of_a_run_that_is_not_well(run: Path, there: Path) -> None:
    send(run, there)
    for step in (1, 2, 3):
        (run / "checkpoints" / f"step-{step:09d}.json").unlink()
    done = cli("backup", run, there, "--prune")
    assert done.lines[0] == "nothing was pruned: the run has no checkpoint that can be resumed from"
    assert cli("backup", run, there, "--json").json["kept"] == [1, 2, 3]
    save_steps(run / "checkpoints", [4, 5], keep=KEEP)
    flip(pack_of(run / "checkpoints", 5))
    done = cli("backup", run, there, "--prune", "--json")
    assert (done.code, done.json["checkpoints"], done.json["kept"]) == (4, [1, 2, 3, 4], [1, 2, 3])


def test_files_that_are_not_ours_are_never_removed(run: Path, there: Path) -> None:
    send(run, there)
    (there / "notes.txt").write_text("mine")
    (there / "sub").mkdir()
    (there / "sub" / "data.bin").write_bytes(b"mine")
    (there / "sub" / "main.0123456789abcdef.js").write_bytes(b"mine")  # named as ours are
    before = contents(there / "sub")
    for number in range(4):
        (run / "train.log").write_text(f"{number}")
        send(run, there, prune=number == 3)
        logs = len(list(there.glob("train.*.log")))
        assert logs == (1 if number == 3 else 2)  # this version and the one before
    assert (there / "notes.txt").read_text() == "mine"
    assert contents(there / "sub") == before


def test_a_backup_below_another_is_left_alone(run: Path, there: Path, tmp_path: Path) -> None:
    second = make_run(tmp_path, 1, 2, variant="second")
    send(run, there)
    send(second, there / "second")
    before = contents(there / "second")
    for prune in (False, True):
        (run / "train.log").write_text(f"{prune}")
        send(run, there, prune=prune)
        assert contents(there / "second") == before
    assert fetch(there / "second", tmp_path / "back").steps == (1, 2)


def test_a_manifest_that_was_replaced_by_another_of_the_same_step(run: Path, there: Path, tmp_path: Path) -> None:
    """As compaction does it: the new version is sent, whatever the old one said."""
    send(run, there)
    manifest = CheckpointReader(run / "checkpoints").manifest(2)
    (run / "checkpoints" / "step-000000002.json").write_bytes(manifest_to_bytes(replace(manifest, reasons=("again",))))
    done = send(run, there)
    assert (done.sent_steps, done.steps, done.left_out) == ((2,), (1, 2, 3), ())
    fetch(there, tmp_path / "back")
    assert CheckpointReader(tmp_path / "back" / "checkpoints").manifest(2).reasons == ("again",)


def test_a_thinned_checkpoint_does_not_take_the_place_of_the_whole_one(run: Path, there: Path) -> None:
    send(run, there)
    thin(run, 2)
    done = send(run, there)
    assert (done.sent_steps, done.steps, done.found_damage) == ((), (1, 2, 3), False)
    assert parse_index((there / "backup.json").read_bytes(), "").checkpoints[1].resumable
    pruned = send(run, there, prune=True)
    assert pruned.sent_steps == (2,)
    assert not parse_index((there / "backup.json").read_bytes(), "").checkpoints[1].resumable


@pytest.mark.parametrize("newest", [True, False])
def test_a_prune_that_is_refused_keeps_the_whole_ones(run: Path, there: Path, newest: bool) -> None:
    """Whether the damage is found before the thinned one or after it."""
    send(run, there)
    save_steps(run / "checkpoints", [4], keep=KEEP)
    thin(run, 2)
    flip(pack_of(run / "checkpoints", 4)) if newest else (run / "checkpoints" / "step-000000001.json").write_bytes(b"")
    done = cli("backup", run, there, "--prune", "--json")
    assert (done.code, done.json["checkpoints"][:3]) == (4, [1, 2, 3])
    assert 2 not in done.json["sent"]
    assert {"step": 2, "file": None, "reason": "the run thinned it; the target keeps the whole", "damaged": False} in (
        done.json["left_out"]
    )
    assert parse_index((there / "backup.json").read_bytes(), "").checkpoints[1].resumable


def test_the_lost_future_of_a_run_that_went_back_is_not_restored(tmp_path: Path, there: Path) -> None:
    """Its newest checkpoint was damaged, it resumed from an older one, and metrics.jsonl was cut there."""
    run = make_run(tmp_path, 1)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    save_with_rows(run, 2, num_bytes=24)
    send(run, there)
    (run / "checkpoints" / "step-000000002.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    done = send(run, there)
    assert (done.steps, done.kept_steps, done.found_damage) == ((1,), (), False)
    assert [(item.step, "gone back" in item.reason) for item in done.left_out] == [(2, True)]


def test_files_that_the_run_lost_stay_in_the_backup_and_are_told(run: Path, there: Path, tmp_path: Path) -> None:
    for name in ("config.canonical.json", "config.yaml", "code/git.json", "notes.txt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    send(run, there)
    (run / "notes.txt").unlink()
    (run / "code" / "git.json").unlink()
    (run / "code").rmdir()
    unneeded = [send(run, there) for _ in range(3)]
    assert [(done.found_damage, len(done.left_out)) for done in unneeded] == [(False, 2)] * 3
    (run / "config.canonical.json").unlink()
    for number in range(3):
        (run / "train.log").write_text(f"{number}")
        done = cli("backup", run, there, "--prune", "--json")
        assert (done.code, done.json["pruned"]) == (4, [])
        assert sorted((item["file"], item["damaged"]) for item in done.json["left_out"]) == [
            ("code/git.json", False), ("config.canonical.json", True), ("notes.txt", False),
        ]  # fmt: skip
    fetch(there, tmp_path / "back")
    for name in ("config.canonical.json", "config.yaml", "code/git.json", "notes.txt"):
        assert (tmp_path / "back" / name).read_text() == name
    (run / "config.canonical.json").write_text("config.canonical.json")
    (run / "code").write_text("a file now")
    send(run, there, prune=True)
    fetch(there, tmp_path / "after")
    assert not (tmp_path / "after" / "notes.txt").exists()
    assert (tmp_path / "after" / "code").read_text() == "a file now"


@pytest.mark.parametrize("harm", ["lost", "cut"])
def test_checkpoints_stay_whatever_becomes_of_the_rows(there: Path, tmp_path: Path, harm: str) -> None:
    run, rows = make_run(tmp_path, 1), '{"step": 1}\n{"step": 2}\n'
    (run / "metrics.jsonl").write_text(rows)
    save_with_rows(run, 2, num_bytes=24)
    save_with_rows(run, 3, num_bytes=24)
    send(run, there)
    (run / "checkpoints" / "step-000000002.json").unlink()
    (run / "metrics.jsonl").unlink() if harm == "lost" else (run / "metrics.jsonl").write_text(rows[:12])
    for _ in range(2):
        done = cli("backup", run, there, "--json")
        assert (done.code, done.json["checkpoints"], done.json["kept"]) == (4, [1, 2, 3], [2])
        assert [(item["file"], item["damaged"]) for item in done.json["left_out"]] == [("metrics.jsonl", True)]
    fetch(there, tmp_path / "back")
    assert (tmp_path / "back" / "metrics.jsonl").read_text() == rows


def test_another_run_is_refused(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    before = contents(there)
    other = make_run(tmp_path, 1, variant="other")
    done = cli("backup", other, there)
    assert done.code == 3
    assert f"holds the backup of {run.name}" in done.err
    assert contents(there) == before


def test_a_copy_that_went_its_own_way_is_refused(run: Path, there: Path) -> None:
    attempts = (sample_attempt(), sample_attempt(number=2, started_at="2026-02-02T00:00:00Z"))
    first = sample_record(run_key=run.name, state="stopped")
    save_record(run / "run.json", replace(first, attempts=attempts))
    send(run, there)
    save_record(run / "run.json", first)
    done = cli("backup", run, there)
    assert done.code == 3
    assert "with an attempt that this one lacks (2026-02-02T00:00:00Z here 7)" in done.err
    save_record(run / "run.json", replace(first, attempts=(*attempts, replace(attempts[1], number=3))))
    assert cli("backup", run, there).code == 0  # the same run, gone on


def test_a_pack_of_the_same_name_and_other_content_is_a_conflict(run: Path, there: Path) -> None:
    """Only the target has step 1 now; step 2 claims the name of its pack for other content."""
    send(run, there)
    index = (there / "backup.json").read_bytes()
    folder = run / "checkpoints"
    pack_of(folder, 1).write_bytes(pack_of(folder, 2).read_bytes())
    old, new = pack_of(folder, 2).name, pack_of(folder, 1).name
    (folder / "step-000000001.json").unlink()
    text = (folder / "step-000000002.json").read_bytes().replace(old.encode(), new.encode())
    body = {name: value for name, value in json.loads(text).items() if name != "digest"}
    (folder / "step-000000002.json").write_bytes(seal(body))
    done = cli("backup", run, there)
    assert done.code == 3
    assert new in done.err
    assert (there / "backup.json").read_bytes() == index


def test_two_at_once_are_refused(run: Path, there: Path, tmp_path: Path) -> None:
    with only_one(run, "a test"):
        done = cli("backup", run, there)
    assert (done.code, "under way" in done.err) == (3, True)
    send(run, there)
    (tmp_path / ".back.restoring").mkdir()
    with only_one(tmp_path / ".back.restoring", "a test"):
        assert cli("restore", there, tmp_path / "back").code == 3
    assert cli("restore", there, tmp_path / "back").code == 0


def test_wrong_words(run: Path, there: Path, tmp_path: Path) -> None:
    for words, code, says in (
        (("backup", f"{run}@2", there), 2, f"backup {run}"),
        (("backup", run, run / "inside"), 2, "inside the run"),
        (("backup", run, "nonsense://x/y"), 2, "expected a folder"),
        (("backup", run, ""), 2, "names no place"),
        (("backup", run, "s3://"), 2, "names no place"),
        (("restore", "/", tmp_path / "back"), 2, "names no place"),
        (("backup", run, "simplecache::s3://bucket/x"), 2, "a chain"),
        (("backup", run, "dropbox://x"), 2, "install"),
        (("restore", there, tmp_path / "back"), 4, "no backup.json"),
        (("restore", there, run), 3, "something is there"),
    ):
        done = cli(*words)
        assert (done.code, done.out) == (code, ""), words
        assert says in done.err
    assert not there.exists()
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gs"), ("sftp", "ssh"), ("ssh", "ssh")])
def test_a_missing_package_is_one_sentence_with_the_line_to_type(
    run: Path, scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gcsfs", "paramiko"):
        monkeypatch.setitem(sys.modules, name, None)
    done = cli("backup", run, f"{scheme}://user:pa55@place/x")
    assert done.code == 2
    assert f"pip install 'dino-exp[{extra}]'" in done.err
    assert "pa55" not in done.err
    assert len(done.err.splitlines()) == 1


def test_a_restore_goes_into_an_empty_directory_and_past_a_file_never(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    (tmp_path / "empty").mkdir()
    assert fetch(there, tmp_path / "empty").steps == (1, 2, 3)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        assert cli("restore", there, tmp_path / name).code == 3
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_without_checkpoints(tmp_path: Path, there: Path) -> None:
    run = make_run(tmp_path)
    before = contents(run)
    assert cli("backup", run, there, "--json").json["checkpoints"] == []
    assert contents(run) == before
    assert cli("restore", there, tmp_path / "back", "--json").json["files"] == 1


def test_neither_verb_imports_torch(run: Path, there: Path, tmp_path: Path) -> None:
    for words in (["backup", str(run), str(there)], ["restore", str(there), str(tmp_path / "back")]):
        program = (
            f"import sys\nsys.argv[1:] = ['checkpoints', *{words!r}]\n"
            "from dino_exp.cli.app import run\nassert run() == 0\nassert 'torch' not in sys.modules\n"
        )
        root = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": root})
