"""Backups and restores of damaged things, by failing backends, and by processes that die."""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from backup_samples import copied, stored, with_logs
from cli_samples import KEEP, cli, contents, make_run
from support.backups import fetch, send, target_of, with_faults
from support.checkpoints import Died, flip, io_error, pack_of, save_steps

from dino_exp.backup import sending
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.store import Store
from dino_exp.errors import BackupError, CorruptCheckpointError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return with_logs(make_run(tmp_path, 1, 2, 3))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


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
    assert f"dino-exp checkpoints backup <run> {there} --reread" in back.err
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


def test_a_damaged_run_json_leaves_the_backup_as_it_was(run: Path, there: Path) -> None:
    send(run, there)
    before = contents(there)
    flip(run / "run.json", 40)
    assert cli("backup", run, there).code == 4
    assert contents(there) == before


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


def test_a_backup_of_another_run_that_was_killed_is_in_the_way(run: Path, there: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path, 7, variant="other")
    send(other, there)
    (there / "backup.json").rename(there / "backup.partial.json")  # as after a kill before the first index
    before = contents(there)
    done = cli("backup", run, there)
    assert (done.code, "remove backup.partial.json to" in done.err) == (3, True)
    assert f"holds the backup of {other.name}" in done.err
    assert contents(there) == before
    (there / "backup.partial.json").unlink()
    assert cli("backup", run, there, "--prune").code == 0
    assert fetch(there, tmp_path / "back").steps == (1, 2, 3)
    assert {path for path in before if not path.exists()} == {there / "backup.partial.json"}


def test_damage_here_of_what_the_target_has_keeps_a_prune_from_it(run: Path, there: Path) -> None:
    send(run, there)
    (run / "checkpoints" / "step-000000001.json").unlink()
    flip(pack_of(run / "checkpoints", 3))
    done = cli("backup", run, there, "--prune", "--json")
    assert (done.code, done.json["checkpoints"], done.json["pruned"]) == (4, [1, 2, 3], [])
    assert [(item["step"], item["damaged"]) for item in done.json["left_out"]] == [(3, True)]


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
