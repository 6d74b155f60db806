"""`backup.json` as a stranger may have written it, the names at the target, and the plan of a backup."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_samples import cli, contents, make_run
from support.backups import send
from support.hostile import agrees, amounts, fuzz, sealed

from dino_exp.backup.index import (
    Index,
    StoredCheckpoint,
    StoredFile,
    index_to_bytes,
    parse_index,
    path_problem,
    stored_path,
)
from dino_exp.backup.plan import (
    Remote,
    keep_lost_files,
    lineage_problem,
    plan_garbage,
    plan_steps,
    retire,
    same_content,
    sort_gone,
    take_stock,
)
from dino_exp.checkpoint.canonical import seal
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import CorruptCheckpointError

KEY = "vit_nano-abababab-cdcdcdcd"
PACK = "checkpoints/packs/step-{0:09d}.a001.r00000.safetensors"


def file(path: str, content: int = 0) -> StoredFile:
    return StoredFile(path=path, bytes=10, sha256=f"{content:x}" * 64, stamp="mtime=1")


def checkpoint(step: int, *, metrics_bytes: int = 0, content: int = 0) -> StoredCheckpoint:
    return StoredCheckpoint(
        step=step, seal="0" * 64, resumable=True, metrics_bytes=metrics_bytes,
        manifest=file(f"checkpoints/step-{step:09d}.json", content), packs=(file(PACK.format(step), content),),
    )  # fmt: skip


def index(*steps: int, files: tuple[StoredFile, ...] = (), attempts: tuple[str, ...] = ("a", "b")) -> Index:
    return Index(
        run_key=KEY, attempts=attempts, made_at="2026-01-01T00:00:00Z", checkpoints=tuple(map(checkpoint, steps)),
        files=files,
    )  # fmt: skip


SAMPLE = index(3, 7, files=(file("run.json"), file("metrics.jsonl"), file("checkpoints/pins.json")))
BODY = json.loads(index_to_bytes(SAMPLE))
del BODY["digest"]


def test_an_index_reads_back() -> None:
    assert parse_index(index_to_bytes(SAMPLE), "backup.json") == SAMPLE


def changed(change: Any) -> bytes:
    body = copy.deepcopy(BODY)
    change(body)
    return seal(body)


@pytest.mark.parametrize(
    "path",
    [
        "../run.json", "/etc/passwd", "a/../../b", "..", ".", "", "a//b", "a/", "lock", "owner.json", "lock/x", "a\\b",
        "a\nb", "a\x00b", "a\ud800", "x" * 201, "/".join("a" * 17), ".run.json.tmp", "code/.git.json.tmp",
        "checkpoints", "checkpoints/registry.json", "checkpoints/../../x", "checkpoints/quarantine/x",
        "checkpoints/packs/x", "checkpoints/step-000000003.json",
    ],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    data = changed(lambda body: body["files"].append({**body["files"][0], "path": path}))
    with pytest.raises(CorruptCheckpointError) as caught:
        parse_index(data, "backup.json")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["checkpoints"][0]["packs"][0].update(path="run.json"),
        lambda body: body["checkpoints"][0]["packs"][0].update(path="checkpoints/packs/../step-000000003.json"),
        lambda body: body["checkpoints"][0]["manifest"].update(path="checkpoints/step-000000007.json"),
        lambda body: body["checkpoints"][0].update(step=7),
        lambda body: body["checkpoints"][0].update(step=10**9),
        lambda body: body["checkpoints"].reverse(),
        lambda body: body["files"][0].update(bytes=2**51),
        lambda body: body["files"][0].update(bytes=-1),
        lambda body: body["files"][0].update(sha256="0" * 63),
        lambda body: body["files"].append({**body["files"][0], "sha256": "f" * 64}),
        lambda body: body["files"].append({**body["files"][0], "path": "run.json/x"}),
        lambda body: body.update(run_key="../x"),
        lambda body: body.update(more=1),
        lambda body: body.pop("attempts"),
        lambda body: body.update(format_version=0),
        lambda body: body.update(format_version=True),
    ],
)
def test_what_cannot_be_is_refused(change: Any) -> None:
    with pytest.raises(CorruptCheckpointError):
        parse_index(changed(change), "backup.json")


def test_there_are_no_more_files_than_a_run_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_exp.backup.index.MAX_FILES", 6)
    with pytest.raises(CorruptCheckpointError, match="7 files, expected at most 6"):
        parse_index(changed(lambda body: None), "backup.json")


def test_a_newer_format_is_not_called_damaged() -> None:
    with pytest.raises(UnsupportedFormatError, match="of a newer version"):
        parse_index(changed(lambda body: body.update(format_version=2, more=[])), "backup.json")


@amounts(60, 3000)
def test_hostile_indexes_are_read_or_refused(num: int) -> None:
    def check(data: bytes) -> None:
        found = parse_index(data, "backup.json")
        assert agrees(json.loads(json.dumps(json.loads(index_to_bytes(found))))["files"], json.loads(data)["files"])
        for each in found.all_files():
            assert path_problem(each.path) is None

    fuzz(sealed(BODY), check, num)


def test_a_hostile_index_writes_nothing_outside(tmp_path: Path) -> None:
    run, there = make_run(tmp_path, 1), tmp_path / "there"
    send(run, there)
    body = json.loads((there / "backup.json").read_text())
    del body["digest"]
    before = contents(tmp_path)
    for change in ({"path": "../../escaped"}, {"bytes": 2**49}, {"sha256": "0" * 64}):
        hostile = copy.deepcopy(body)
        hostile["files"][0].update(change)
        (there / "backup.json").write_bytes(seal(hostile))
        done = cli("restore", there, tmp_path / "deep" / "er" / "back")
        assert (done.code, len(done.err.splitlines())) == (3 if "bytes" in change else 4, 1)
        assert {path for path in contents(tmp_path) if "deep" not in path.parts} == before.keys()
    (there / "backup.json").write_bytes(b"x" * (65 << 20))
    assert "more than" in cli("restore", there, tmp_path / "back").err
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("run.json", "run.{}.json"),
        (".hydra/attempts/002/config.yaml", ".hydra/attempts/002/config.{}.yaml"),
        ("code/untracked.tar.gz", "code/untracked.tar.{}.gz"),
        (".gitignore", ".gitignore.{}"),
        ("a.b/LICENSE", "a.b/LICENSE.{}"),
    ],
)
def test_names_at_the_target(path: str, expected: str) -> None:
    assert stored_path(path, "0123456789abcdef" * 4) == expected.format("0123456789abcdef")


def test_stock_is_good_doubtful_or_bad() -> None:
    files = {f"f{n}": file(f"f{n}") for n in range(4)}
    there = {"f0": Remote(10, "mtime=1"), "f1": Remote(10, "mtime=2"), "f2": Remote(9, "mtime=1")}
    stock = take_stock(files, there)
    assert (list(stock.good), list(stock.doubtful)) == (["f0"], ["f1"])
    assert stock.bad == {"f2": "has 9 bytes, expected 10", "f3": "is missing"}


def test_steps_to_send() -> None:
    there = {step: checkpoint(step) for step in (1, 2, 3, 4)}
    same = there[2].identity
    plan = plan_steps({2: same, 3: (same[0], "f" * 64), 4: None, 5: same}, there)
    assert (plan.have, plan.send, plan.gone) == ((2,), (3, 4, 5), (1,))


def test_what_the_run_has_gone_back_behind() -> None:
    kept, passed = sort_gone([checkpoint(9, metrics_bytes=31), checkpoint(4, metrics_bytes=30)], metrics_bytes=30)
    assert ([one.step for one in kept], [one.step for one in passed]) == ([4], [9])
    kept, passed = sort_gone([checkpoint(9, metrics_bytes=31)], metrics_bytes=None)
    assert ([one.step for one in kept], passed) == ([9], [])


def test_what_the_run_lost_is_kept_unless_something_else_is_in_its_place() -> None:
    before = replace(index(), files=tuple(map(file, ("a", "b/c", "d", "e", "f"))))
    now = [file("a", 2), file("b"), file("d/x")]
    assert keep_lost_files(before, now, {*before.stored()} - {file("f").stored}) == [file("e")]
    assert keep_lost_files(None, now, ()) == []


@pytest.mark.parametrize(
    ("run_key", "attempts", "says"),
    [
        (KEY, ["a", "b"], None),
        (KEY, ["a", "b", "c"], None),
        (KEY, ["a"], "an attempt that this one lacks (b)"),
        (KEY, ["a", "c", "d"], "an attempt that this one lacks (b)"),
        (KEY, ["b", "a"], "another copy"),
        (f"{KEY}-other", ["a", "b"], f"holds the backup of {KEY}"),
    ],
)
def test_whose_backup_it_is(run_key: str, attempts: list[str], says: str | None) -> None:
    problem = lineage_problem(index(1), run_key=run_key, attempts=attempts)
    assert problem is None if says is None else says in str(problem)


def test_garbage_is_what_an_index_has_named_and_no_backup_needs() -> None:
    old, before, now = (replace(index(1), files=(file("run.json", content),)) for content in (1, 2, 3))
    dropped = checkpoint(9)
    named = {**old.stored(), **before.stored(), **{each.stored: each for each in dropped.files}}
    there = {*named, *now.stored(), "dist/main.0123456789abcdef.js", "backup.json", "backup.partial.json"}
    now = retire(now, named, there)
    (first,), (second,) = old.files, before.files
    assert plan_garbage(there, now, before, prune=False) == ["backup.partial.json", first.stored]
    assert set(plan_garbage(there, now, before, prune=True)) == {
        "backup.partial.json", first.stored, second.stored, *(each.stored for each in dropped.files),
    }  # fmt: skip
    assert plan_garbage(now.stored(), retire(now, named, now.stored()), None, prune=True) == []


def test_an_index_that_names_what_was_removed_need_not_be_written_anew() -> None:
    more = replace(SAMPLE, retired=(file("a", 1), file("b", 2)))
    assert same_content(replace(SAMPLE, made_at="now"), more)
    assert not same_content(more, SAMPLE)
    assert not same_content(SAMPLE, None)
    assert not same_content(replace(SAMPLE, attempts=()), SAMPLE)
