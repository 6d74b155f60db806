"""`dino-exp checkpoints backup|restore` on folders and on fsspec's memory, in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from cli_samples import KEEP, cli, contents, make_run
from runs_samples import sample_attempt, sample_record
from support.backups import fetch, send, target_of, with_faults
from support.checkpoints import Died, ToyState, flip, io_error, open_manager, pack_of, save_steps

from dino_exp.backup import sending
from dino_exp.backup.index import parse_index
from dino_exp.backup.source import only_one
from dino_exp.checkpoint.canonical import seal
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.pins import pin
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.store import Store
from dino_exp.cli.owning import own
from dino_exp.errors import BackupError, CorruptCheckpointError
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.record import save_record

LOGS = {"metrics.jsonl": '{"step": 1}\n', "train.log": "hello\n", ".hydra/config.yaml": "seed: 0\n"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return with_logs(make_run(tmp_path, 1, 2, 3))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture(params=["folder", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "far" / "away") if request.param == "folder" else f"memory://{uuid4().hex}"


def with_logs(run: Path) -> Path:
    for name, text in LOGS.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(text)
    return run


def stored(there: Path, pattern: str) -> Path:
    (found,) = there.rglob(pattern)
    return found


def copied(run: Path) -> dict[str, bytes]:
    """What must come back: everything but the locks, the registry and what lies in quarantine."""
    apart = ("lock", "owner.json", "checkpoints/registry.json", "checkpoints/pins.lock")
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in apart and "quarantine" not in name}


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


def test_a_log_that_grows_and_is_cut_while_it_is_copied(run: Path, there: Path, tmp_path: Path) -> None:
    """The training that resumed just now has cut metrics.jsonl: what was read of it first is not kept."""
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    target = target_of(there)
    inner, tried = target.send, []

    def cutting(path: str, blocks: Callable[[], object]) -> None:
        if "metrics" in path:
            tried.append(path)
            (run / "metrics.jsonl").write_text('{"step": 1}\n')
        inner(path, blocks)  # type: ignore[arg-type]

    target.send = cutting  # type: ignore[method-assign]
    send(run, there, target=target)
    fetch(there, tmp_path / "back")
    assert (tmp_path / "back" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert len(tried) == 2


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
    for number in range(4):
        (run / "train.log").write_text(f"{number}")
        send(run, there, prune=number == 3)
        logs = len(list(there.glob("train.*.log")))
        assert logs == (1 if number == 3 else 2)  # this version and the one before
    assert (there / "notes.txt").read_text() == "mine"
    assert (there / "sub" / "data.bin").read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_left_out_and_the_others_are_backed_up(run: Path, there: Path, tmp_path: Path) -> None:
    flip(pack_of(run / "checkpoints", 2))
    (run / "checkpoints" / "step-000000001.json").write_bytes(b"{}")
    done = cli("backup", run, there, "--json")
    assert (done.code, done.json["checkpoints"], done.json["verified"]) == (4, [3], False)
    assert [(item["step"], item["damaged"]) for item in done.json["left_out"]] == [(2, True), (1, True)]
    printed = cli("backup", run, there)
    assert printed.code == 4
    assert any(line.startswith("  step 2: ") and "digest" in line for line in printed.lines)
    assert fetch(there, tmp_path / "back").steps == (3,)


def test_what_was_good_at_the_last_backup_is_kept_there(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    (run / "checkpoints" / "step-000000003.json").write_bytes(b"{}")
    done = cli("backup", run, there, "--json")
    assert (done.code, done.json["checkpoints"], done.json["sent"]) == (4, [1, 2, 3], [])
    assert "keeps the good one" in done.json["left_out"][0]["reason"]
    assert fetch(there, tmp_path / "back").steps == (1, 2, 3)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_what_changed_at_the_target_is_noticed_named_and_mended(
    run: Path, there: Path, tmp_path: Path, harm: str
) -> None:
    send(run, there)
    hurt = stored(there, "step-000000002.a001*")
    if harm == "flip":
        flip(hurt)
    elif harm == "cut":
        hurt.write_bytes(hurt.read_bytes()[:-3])
    else:
        hurt.unlink()
    broken = cli("restore", there, tmp_path / "broken", "--json")
    assert (broken.code, broken.json["checkpoints"], broken.json["verified"]) == (4, [1, 3], False)
    assert hurt.name in broken.json["left_out"][0]["reason"]
    assert CheckpointReader(tmp_path / "broken" / "checkpoints").verify()["ok"]
    done = cli("backup", run, there, "--json")
    assert (done.code, done.json["sent"], done.json["checkpoints"]) == (4, [2], [1, 2, 3])
    assert [hurt.name in text for text in done.json["spoiled"]] == [True]
    assert cli("backup", run, there).code == 0
    assert fetch(there, tmp_path / "whole").steps == (1, 2, 3)


def test_a_checkpoint_that_only_the_target_had_and_lost_is_told(run: Path, there: Path) -> None:
    send(run, there)
    (run / "checkpoints" / "step-000000001.json").unlink()
    stored(there, "step-000000001.a001*").unlink()
    done = cli("backup", run, there)
    assert done.code == 4
    assert any("step 1: only the target had it" in line and "is missing" in line for line in done.lines)
    assert cli("backup", run, there, "--json").json["checkpoints"] == [2, 3]


def test_a_damaged_record_or_log_at_the_target(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    flip(stored(there, "train.*.log"))
    back = cli("restore", there, tmp_path / "a")
    assert back.code == 4
    assert any(line.startswith("  train.log: ") for line in back.lines)
    assert not (tmp_path / "a" / "train.log").exists()
    flip(stored(there, "run.*.json"))
    assert "no run.json" in cli("restore", there, tmp_path / "b").err
    assert not (tmp_path / "b").exists()


def test_nothing_good_is_not_put_in_place(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    for path in there.rglob("*.safetensors"):
        flip(path)
    back = cli("restore", there, tmp_path / "back")
    assert back.code == 4
    assert "no checkpoint of this backup is good" in back.err
    assert not (tmp_path / "back").exists()


def test_a_damaged_index_stops_both_and_says_what_to_do(run: Path, there: Path, tmp_path: Path) -> None:
    send(run, there)
    flip(there / "backup.json", 40)
    assert cli("restore", there, tmp_path / "back").code == 4
    done = cli("backup", run, there)
    assert done.code == 4
    assert "remove it" in done.err
    (there / "backup.json").unlink()
    again = send(run, there)
    content = sum(path.stat().st_size for path in there.rglob("*.*.*"))
    assert again.bytes_skipped == content  # all of it was found, and read back
    assert fetch(there, tmp_path / "back").steps == (1, 2, 3)


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
    manifest = CheckpointReader(run / "checkpoints").manifest(2)
    thin = manifest_to_bytes(replace(manifest, resumable=False))
    (run / "checkpoints" / "step-000000002.json").write_bytes(thin)
    done = send(run, there)
    assert (done.sent_steps, done.steps, done.found_damage) == ((), (1, 2, 3), False)
    assert parse_index((there / "backup.json").read_bytes(), "").checkpoints[1].resumable
    pruned = send(run, there, prune=True)
    assert pruned.sent_steps == (2,)
    assert not parse_index((there / "backup.json").read_bytes(), "").checkpoints[1].resumable


def test_a_checkpoint_that_is_dropped_while_it_is_copied(
    run: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(run / "checkpoints")
    find_damage = sending.find_damage

    def dropping(manifest, files, folder, heard):
        if manifest.step == 2:
            store.hide(2)
            store.erase(2, [pack.name for pack in manifest.packs])
        return find_damage(manifest, files, folder, heard)

    monkeypatch.setattr(sending, "find_damage", dropping)
    done = cli("backup", run, there, "--json")
    assert (done.code, done.json["checkpoints"]) == (0, [1, 3])
    assert [(item["step"], item["damaged"]) for item in done.json["left_out"]] == [(2, False)]


def test_a_checkpoint_that_is_replaced_while_it_is_copied(
    run: Path, there: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_damage, num = sending.find_damage, []
    path = run / "checkpoints" / "step-000000002.json"

    def replacing(manifest, files, folder, heard):
        if manifest.step == 2 and not num:
            num.append(1)
            path.write_bytes(manifest_to_bytes(replace(manifest, reasons=("again",))))
        return find_damage(manifest, files, folder, heard)

    monkeypatch.setattr(sending, "find_damage", replacing)
    assert send(run, there).steps == (1, 2, 3)
    fetch(there, tmp_path / "back")
    assert (tmp_path / "back" / "checkpoints" / path.name).read_bytes() == path.read_bytes()


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


def save_with_rows(run: Path, step: int, num_bytes: int) -> None:
    save_steps(run / "checkpoints", [step], keep=KEEP)
    manifest = CheckpointReader(run / "checkpoints").manifest(step)
    aside = {**manifest.aside, "metrics_rows": 2, "metrics_bytes": num_bytes}
    (run / "checkpoints" / f"step-{step:09d}.json").write_bytes(manifest_to_bytes(replace(manifest, aside=aside)))


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


def test_an_interrupted_restore_goes_on_and_is_no_run_meanwhile(run: Path, tmp_path: Path) -> None:
    url = f"memory://{uuid4().hex}"
    send(run, url)
    outputs = tmp_path / "outputs"
    directory = outputs / "runs" / run.name
    target = with_faults(url, 14, Died, once=False)
    with pytest.raises(Died):
        fetch(url, directory, target=target)
    assert not directory.exists()
    assert list(outputs.rglob("*.log")) or list(outputs.rglob("*.json"))
    assert cli("list", "--outputs", outputs, noun="runs").out.count("vit_nano") == 0
    stranger = outputs / "runs" / f".{run.name}.restoring" / "run" / "old"
    stranger.mkdir()
    (stranger / "file").write_text("of another version of the backup")
    done = fetch(url, directory)
    assert done.bytes_skipped > 0
    assert copied(directory) == copied(run)
    assert not (directory / "old").exists()


def test_a_restore_without_room_is_refused(run: Path, there: Path, tmp_path: Path, monkeypatch) -> None:
    send(run, there)
    monkeypatch.setattr("dino_exp.fsio.Files.free_bytes", lambda self, path: 1000)
    done = cli("restore", there, tmp_path / "back")
    assert (done.code, "MB free" in done.err) == (3, True)


def test_a_run_without_checkpoints(tmp_path: Path, there: Path) -> None:
    run = make_run(tmp_path)
    before = contents(run)
    assert cli("backup", run, there, "--json").json["checkpoints"] == []
    assert contents(run) == before
    assert cli("restore", there, tmp_path / "back", "--json").json["files"] == 1


def test_a_damaged_run_json_leaves_the_backup_as_it_was(run: Path, there: Path) -> None:
    send(run, there)
    before = contents(there)
    flip(run / "run.json", 40)
    assert cli("backup", run, there).code == 4
    assert contents(there) == before


def test_neither_verb_imports_torch(run: Path, there: Path, tmp_path: Path) -> None:
    for words in (["backup", str(run), str(there)], ["restore", str(there), str(tmp_path / "back")]):
        program = (
            f"import sys\nsys.argv[1:] = ['checkpoints', *{words!r}]\n"
            "from dino_exp.cli.app import run\nassert run() == 0\nassert 'torch' not in sys.modules\n"
        )
        root = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": root})


def test_death_at_every_call_of_the_backend(tmp_path: Path, survived: Callable[[str, int], None]) -> None:
    """After each: the old backup or the new one is there, whole; the same command then brings the new one."""
    first = make_run(tmp_path / "first", 1, 2)
    second = tmp_path / "second" / first.name
    shutil.copytree(first, second)
    save_steps(second / "checkpoints", [3, 4], keep=KEEP)
    (second / "train.log").write_text("more")
    for fail_at in range(1, 1000, 2):
        url = f"memory://{uuid4().hex}"
        send(first, url)
        target = with_faults(url, fail_at, Died, once=False)
        finished = died(lambda target=target, url=url: send(second, url, target=target))
        assert fetch(url, tmp_path / f"a{fail_at}").steps in ((1, 2), (1, 2, 3, 4))
        done = send(second, url)
        whole = sum(len(data) for data in copied(second).values())
        assert target._fs.bytes_written + done.bytes_sent < 1.5 * whole
        assert fetch(url, tmp_path / f"b{fail_at}").steps == (1, 2, 3, 4)
        if finished:
            break
    assert fail_at > 40
    survived("calls of a backup's backend at which the process died", fail_at // 2)


def test_death_at_every_call_of_a_restore(tmp_path: Path, survived: Callable[[str, int], None]) -> None:
    run = with_logs(make_run(tmp_path, 1, 2))
    url = f"memory://{uuid4().hex}"
    send(run, url)
    for fail_at in range(1, 1000, 3):
        directory = tmp_path / f"back{fail_at}"
        target = with_faults(url, fail_at, Died, once=False)
        finished = died(lambda target=target, directory=directory: fetch(url, directory, target=target))
        assert directory.exists() == finished
        if finished:
            break
        assert fetch(url, directory).steps == (1, 2)
        assert copied(directory) == copied(run)
    assert fail_at > 20
    survived("calls of a restore's backend at which the process died", fail_at // 3)


def test_a_pack_that_the_disk_does_not_give_is_left_out(
    run: Path, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_damage = sending.find_damage

    def failing(manifest, files, folder, heard):
        if manifest.step == 2:
            raise io_error()
        return find_damage(manifest, files, folder, heard)

    monkeypatch.setattr(sending, "find_damage", failing)
    done = cli("backup", run, there, "--json")
    assert (done.code, done.json["checkpoints"]) == (4, [1, 3])
    assert "Input/output error" in done.json["left_out"][0]["reason"]


def test_a_large_file_takes_no_memory(run: Path, there: Path, tmp_path: Path) -> None:
    num_bytes = 96 << 20
    with (run / "large.bin").open("wb") as file:
        file.truncate(num_bytes)
    tracemalloc.start()
    try:
        send(run, there)
        fetch(there, tmp_path / "back")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "back" / "large.bin").stat().st_size == num_bytes
    assert peak < 40 << 20


def died(work: Callable[[], object]) -> bool:
    try:
        work()
    except Died:
        return False
    return True


def test_an_error_at_every_call_of_the_backend_is_tried_again(tmp_path: Path, survived) -> None:
    run = make_run(tmp_path, 1, 2)
    for fail_at in range(1, 1000, 2):
        url = f"memory://{uuid4().hex}"
        said: list[str] = []
        target = with_faults(url, fail_at, lambda: ConnectionResetError("gone away"), once=True)
        target._say = said.append
        assert send(run, url, target=target).steps == (1, 2)
        if not said:
            break
        assert "ConnectionResetError: gone away; trying again in" in said[0]
    assert fail_at > 30
    survived("calls of a backup's backend that failed", fail_at // 2)


def test_a_backend_that_stays_away_is_given_up_and_told(run: Path) -> None:
    url = f"memory://{uuid4().hex}"
    said: list[str] = []
    target = with_faults(url, 9, lambda: TimeoutError("no answer"), once=False)
    target._say = said.append
    with pytest.raises(BackupError, match=r"could not .* 4 times: TimeoutError: no answer\. The same command goes on"):
        send(run, url, target=target)
    assert len(said) == 3
    with pytest.raises(BackupError, match="PermissionError"):
        send(run, url, target=with_faults(url, 9, lambda: PermissionError("no"), once=False))


def test_a_target_that_gives_back_other_bytes_is_not_believed(run: Path) -> None:
    url = f"memory://{uuid4().hex}"
    target = target_of(url)
    inner = target.send
    target.send = lambda path, blocks: inner(path, lambda: [b"x" * sum(map(len, blocks()))])  # type: ignore
    with pytest.raises(BackupError, match="is not what was sent when it is read back"):
        send(run, url, target=target)
    assert "backup.json" not in target.listing()


def test_an_unfinished_backup_is_told_from_none(run: Path, tmp_path: Path) -> None:
    url = f"memory://{uuid4().hex}"
    target = target_of(url)
    inner = target.replace
    calls: list[str] = []

    def dying(path: str, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise Died
        inner(path, data)

    target.replace = dying  # type: ignore[method-assign]
    with pytest.raises(Died):
        send(run, url, target=target)
    assert calls == ["backup.partial.json"] * 2 + ["backup.json"]
    assert "did not come to its end" in cli("restore", url, tmp_path / "back").err
    assert send(run, url).steps == (1, 2, 3)
    assert "backup.partial.json" not in target.listing()


def test_verify_of_a_hostile_but_consistent_backup(run: Path, there: Path, tmp_path: Path) -> None:
    """Its digests fit its files, and the checkpoint in them is damaged: nothing is put in place."""
    flip(pack_of(run / "checkpoints", 3))
    original = sending.find_damage
    sending.find_damage = lambda *_: iter(())  # type: ignore[assignment]
    try:
        send(run, there)
    finally:
        sending.find_damage = original
    with pytest.raises(CorruptCheckpointError, match="step 3 in them is damaged"):
        fetch(there, tmp_path / "back")
    assert not (tmp_path / "back").exists()
