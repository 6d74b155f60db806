"""`dino-exp runs`: what people and programs get, and what they are told when they type something else."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from catalogue_samples import make
from cli_samples import cli, contents, make_run
from runs_samples import CODE_HEX, CONFIG_HEX, sample_attempt
from support.checkpoints import KINDS, ToyState, open_manager, request

from dino_exp.catalogue.catalogue import Catalogue
from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.runs.record import CodeRef

runs = functools.partial(cli, noun="runs")
PUBLIC = {
    "run_key", "path", "state", "config_hash", "group_hash", "code", "data_fingerprint", "parent", "attempts", "step",
    "epochs_done", "metrics", "best",
}  # fmt: skip


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    make(tmp_path, "a", 0.5, 0.9, tags=("paper",), metrics={"knn_top1": 0.9})
    make(tmp_path, "b", 0.8, seed=1, state="failed", metrics={"knn_top1": 0.8})
    return tmp_path


@pytest.mark.parametrize("noted", [True, False])
def test_list_for_programs(outputs: Path, noted: bool) -> None:
    if noted:
        Catalogue(outputs).rebuild(lambda *_: None)
    before = contents(outputs)
    rows = runs("list", "--outputs", outputs, "--json", "--sort", "key").json
    assert [row.keys() for row in rows] == [PUBLIC, PUBLIC]
    assert [Path(row["path"]).is_dir() for row in rows] == [True, True]
    assert rows[0]["attempts"] == 1
    assert rows[0]["code"] == {"id": CODE_HEX, "commit": "0" * 40, "dirty": False}
    assert [row["state"] for row in rows] == ["stopped", "failed"]
    assert contents(outputs) == before


def test_list_for_people(outputs: Path) -> None:
    found = runs("list", "--outputs", outputs, "--sort", "knn_top1", "--columns", "run_key,model,seed,knn_top1,commit")
    assert found.lines[0].split() == ["run_key", "model", "seed", "knn_top1", "commit"]
    assert [line.split()[1:] for line in found.lines[1:]] == [
        ["vit_nano", "0", "0.9000", "000000000000"],
        ["vit_nano", "1", "0.8000", "000000000000"],
    ]
    found = runs("list", "--outputs", outputs, "--columns", "best, optimizer,train.accumulate,knn_1shot", "--limit", 1)
    assert found.lines[1].split() == ["–", "–", "1", "–"]
    assert "1 of 2 runs; all: --limit 0" in runs("list", "--outputs", outputs, "--limit", "1").out
    assert "no run of these below" in runs("list", "--outputs", outputs, "--tag", "x").out
    assert "no run below" in runs("list", "--outputs", outputs / "nowhere").out
    assert len(runs("list", "--outputs", outputs, "--state", "failed").lines) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("list", "--where", "optimizer.lrr=1"), "did you mean optimizer.lr"),
        (("list", "--state", "dead"), "expected one of running"),
        (("list", "--sort", "nix"), "no run has this metric"),
        (("list", "--columns", "run_key,knn_tpo1"), "--columns knn_tpo1: no such column; did you mean knn_top1"),
        (("list", "--columns", "run_keyy"), "did you mean run_key"),
        (("list", "--columns", "xyzzy"), "expected run_key, path, state"),
        (("list", "--columns", ""), "expected names with commas between"),
        (("list", "--columns", "runtime.threads"), "no such column"),
        (("best", "--commit", "no such branch"), "expected the first digits of a commit's hash, or a revision"),
        (("best", "--metric", "nix"), "no checkpoint has it; there are knn_top1, loss"),
        (("best", "--mode", "top"), "expected max or min"),
        (("show", "nothing"), "no run in"),
        (("diff", "last", "nothing"), "no run in"),
    ],
)
def test_wrong_words_are_one_message(words: tuple[str, ...], says: str, outputs: Path) -> None:
    found = runs(*words, "--outputs", outputs)
    assert (found.code, found.out) == (2, "")
    assert says in found.err


def test_best(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = runs("best", "--outputs", outputs, "--json").json
    code = {"id": "e" * 64, "commit": "f" * 40, "dirty": None}  # of the toy checkpoints: no attempt of these runs
    assert [row["best"] for row in rows] == [
        {"step": 2, "metric": "knn_top1", "value": 0.9, "code": code},
        {"step": 1, "metric": "knn_top1", "value": 0.8, "code": code},
    ]
    lines = runs("best", "--outputs", outputs, "--metric", "loss").lines
    assert re.split(r"\s{2,}", lines[1])[1:4] == ["0.1000", "2", "stopped"]
    assert lines[-1] == f"the best: dino-exp checkpoints show {rows[0]['path']}@2"
    assert cli("show", f"{rows[0]['path']}@2").code == 0
    moved = outputs / "two words"
    moved.mkdir()
    shutil.copytree(outputs / "runs", moved / "runs")
    command = runs("best", "--outputs", moved).lines[-1].removeprefix("the best: dino-exp checkpoints ")
    assert cli(*shlex.split(command)).code == 0
    assert runs("best", "--outputs", outputs, "--commit", "abc").out.startswith(
        "no checkpoint of these that commit abc has written has knn_top1"
    )
    asked = "dino_exp.runs.code_identity.ask_git"
    monkeypatch.setattr(asked, lambda _, *words: "f" * 40 if "HEAD^{commit}" in words else None)
    assert runs("best", "--outputs", outputs, "--commit", "HEAD", "--json").json == rows


@pytest.mark.parametrize("words", [("list",), ("best",), ("best", "--group"), ("best", "--metric", "nix")])
def test_where_there_is_no_run_it_says_where_it_looked_and_what_to_do(words: tuple[str, ...], tmp_path: Path) -> None:
    told = f"no run below {tmp_path}; `python -m dino_exp.train` makes one, `--outputs DIR` looks elsewhere\n"
    found = runs(*words, "--outputs", tmp_path)
    assert (found.code, found.out, found.err) == (0, told, "")
    assert runs(*words, "--outputs", tmp_path, "--json").json == []


def test_where_no_checkpoint_was_saved_yet_best_says_what_to_look_at(tmp_path: Path) -> None:
    make(tmp_path, "a")
    found = runs("best", "--outputs", tmp_path)
    look = f"dino-exp runs list --outputs {tmp_path}"
    assert found.out == f"no checkpoint of these has knn_top1, below {tmp_path}; how far the runs are: {look}\n"
    assert (found.code, found.err) == (0, "")


def test_best_names_the_code_that_wrote_the_checkpoint(tmp_path: Path) -> None:
    later = CodeRef(id="1" * 64, commit="1" * 40, dirty=True)
    run = make(tmp_path, "a", 0.5, attempts=(sample_attempt(), replace(sample_attempt(2), code=later)))
    written = {"config_hash": f"c1:{CONFIG_HEX}", "code_id": later.id, "git_commit": later.commit}
    manager = open_manager(run / "checkpoints", attempt=2, keep=KeepAny((LatestN(9),)))
    manager.save(ToyState(2), request(2, metrics={"knn_top1": 0.9}, record=written))
    manager.save(ToyState(3), request(3, metrics={"knn_top1": 0.5}, record=written))
    (row,) = runs("best", "--outputs", tmp_path, "--json").json
    assert row["code"]["commit"] == "0" * 40
    assert row["best"]["code"] == {"id": later.id, "commit": later.commit, "dirty": True}
    assert runs("best", "--outputs", tmp_path).lines[1].split()[4] == "111111111111+"
    (group,) = runs("best", "--outputs", tmp_path, "--group", "--json").json
    assert group["best"]["code"] == row["best"]["code"]
    (row,) = runs("best", "--outputs", tmp_path, "--json", "--commit", "ffff").json
    assert (row["best"]["step"], row["best"]["code"]["commit"]) == (1, "f" * 40)
    (worst,) = runs("best", "--outputs", tmp_path, "--json", "--mode", "min").json
    assert worst["best"]["step"] == 1  # as good as that of another commit, and earlier


def test_best_of_groups(outputs: Path) -> None:
    (group,) = runs("best", "--group", "--outputs", outputs, "--json").json
    assert (group["mean"], group["min"], group["max"], group["seeds"]) == (pytest.approx(0.85), 0.8, 0.9, [0, 1])
    assert runs("best", "--group", "--outputs", outputs).lines[1].split()[1:3] == ["2", "0.8500"]


def test_groups_of_forks_have_short_digests_for_people(outputs: Path) -> None:
    origin, fork = "s1:" + "0123456789abcdef" * 4, make(outputs, "f", 0.7, group_hash="g1:" + "ab" * 32)
    (fork / "config.canonical.json").write_text(json.dumps({"origin": origin, "seed": 0}))
    found = runs("best", "--group", "--outputs", outputs)
    assert found.lines[2].split()[-1] == "s1:01234567"
    assert runs("best", "--group", "--outputs", outputs, "--json").json[1]["settings"]["origin"] == origin


def test_show_with_lineage_and_trouble(outputs: Path) -> None:
    parent, attempts = "vit_nano-abababab-cdcdcdcd-a", (sample_attempt(outcome="failed", error="it broke"),)
    child = make(outputs, "c", parent={"run_key": parent, "step": 2}, attempts=attempts, state="failed")
    make(outputs, "d", parent={"run_key": child.name, "step": 5})
    found = runs("show", child, "--json").json
    assert found.keys() > PUBLIC
    assert found["ancestors"] == [{"run_key": parent, "step": 2, "is_here": True}]
    assert found["children"] == ["vit_nano-abababab-cdcdcdcd-d"]
    assert found["checkpoints"] == {"num": 0, "bytes": 0, "problem": None}
    assert found["attempts_made"][0]["error"] == "it broke"
    printed = runs("show", child).out
    assert f"{parent}@2" in printed
    assert "it broke" in printed
    grandchild = runs("show", f"{child.name[:-1]}d", "--outputs", outputs, "--json").json
    assert [one["run_key"] for one in grandchild["ancestors"]] == [child.name, parent]


def test_show_counts_bytes_that_checkpoints_share_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    KINDS["delta"].save_steps(run / "checkpoints", [1, 2, 3])
    packs = sum(path.stat().st_size for path in (run / "checkpoints" / "packs").iterdir())
    manifests = sum(path.stat().st_size for path in (run / "checkpoints").glob("step-*.json"))
    reader = CheckpointReader(run / "checkpoints")
    assert sum(info.bytes for info in reader.infos()) > packs + manifests
    found = runs("show", run, "--json").json["checkpoints"]
    assert found == {"num": 2, "bytes": reader.listing().disk_bytes, "problem": None}
    assert packs <= found["bytes"] <= packs + manifests


def test_the_line_that_starts_a_run(outputs: Path) -> None:
    (run,) = outputs.glob("runs/*-a")
    assert "nobody knows what was typed" in runs("show", run, "--command").err
    (run / ".hydra").mkdir()
    (run / ".hydra" / "overrides.yaml").write_text("- seed=1\n- run.note='two words'\n")
    assert runs("show", run, "--command").out == "python -m dino_exp.train seed=1 'run.note='\"'\"'two words'\"'\"''\n"
    (run / ".hydra" / "overrides.yaml").write_text("a: 1\n")
    assert runs("show", run, "--command").code == 4


def test_diff_puts_causes_first(outputs: Path) -> None:
    (a,), (b,) = outputs.glob("runs/*-a"), outputs.glob("runs/*-b")
    for run, seed, lr, tags, torch in ((a, 0, 0.1, "[]", "2.13.0"), (b, 1, 0.2, "[x]", "2.11.0")):
        (run / "config.yaml").write_text(f"run:\n  tags: {tags}\nseed: {seed}\noptimizer:\n  lr: {lr}\n")
        (run / "environment.json").write_text(json.dumps({"packages": {"torch": torch}, "argv": [str(seed)]}))
    found = runs("diff", a, b, "--json").json
    assert [(row["section"], row["key"], row["a"], row["b"]) for row in found["differences"]] == [
        ("settings", "optimizer.lr", 0.1, 0.2),
        ("seed", "seed", 0, 1),
        ("environment", "packages.torch", "2.13.0", "2.11.0"),
        ("runtime", "run.tags", [], ["x"]),
    ]
    assert found["metrics"] == [{"name": "knn_top1", "a": 0.9, "b": 0.8}]
    assert found["same_cause"] is False
    assert "optimizer.lr" in runs("diff", a, b).out
    assert ["seed", "seed", "0", "1"] in [line.split() for line in runs("diff", a, b).lines]
    (a / "config.yaml").write_text("run:\n  note: null\nlogger:\n  report: true\nseed: 0\n")
    (b / "config.yaml").write_text("run:\n  note: x\nlogger:\n  report: false\nseed: 0\n")
    shown = [line.split() for line in runs("diff", a, b).lines]
    for row in (["run.note", "null", "x"], ["logger.report", "true", "false"]):
        assert ["runtime", *row] in shown
    (a / "config.yaml").write_text("seed: 0\n")
    assert ["runtime", "run.note", "–", "x"] in [line.split() for line in runs("diff", a, b).lines]
    same = runs("diff", a, a).out
    assert same == "nothing differs that could change a result\n"


def test_diff_sees_what_later_attempts_had_otherwise(outputs: Path) -> None:
    (a,) = outputs.glob("runs/*-a")
    later, why = CodeRef(id="1" * 64, commit="1" * 40, dirty=False), ("runtime.threads: 1 before, 2 now",)
    resumed = replace(sample_attempt(2, exact=False, why_not_exact=why), code=later)
    b = make(outputs, "c", attempts=(sample_attempt(), resumed, replace(resumed, number=3)), metrics={"knn_top1": 0.9})
    changes = [{"key": "runtime.threads", "was": 1, "now": 2}, {"key": "run.note", "was": None, "now": "x"}]
    for run in (a, b):
        (run / "config.yaml").write_text("seed: 0\n")
        (run / "code").mkdir()
        (run / "code" / "git.json").write_text(json.dumps({"id": CODE_HEX}))
    for folder, content in ((".hydra/attempts/002/diff.json", changes), ("code/attempts/002/git.json", vars(later))):
        (b / folder).parent.mkdir(parents=True)
        (b / folder).write_text(json.dumps(content))
    found = runs("diff", a, b, "--json").json
    assert [(row["section"], row["key"], row["a"], row["b"]) for row in found["differences"]] == [
        ("code", "id, attempt 2", None, "1" * 64),
        ("code", "commit, attempt 2", None, "1" * 40),
        ("code", "dirty, attempt 2", None, False),
        ("numerics", "runtime.threads, attempt 2", None, 2),
        ("numerics", "not exact, attempt 2", None, why[0]),
        ("numerics", "not exact, attempt 3", None, why[0]),
        ("runtime", "run.note, attempt 2", None, "x"),
    ]
    assert (found["same_cause"], found["inexact"][0]["attempt"]) == (False, 2)
    code = runs("diff", a, b, "--code").lines
    assert code[0] == f"the same code: {CODE_HEX}"
    assert code[2:4] == [f"# {b.name} from attempt 2 on:", f"# from commit None to {'1' * 40}"]
    same = runs("diff", b, b)
    assert same.lines[0] == "nothing differs that is recorded, but not every attempt is exact:"
    assert f"attempt 2: {why[0]}" in same.lines[1]
    assert runs("diff", b, b, "--json").json["same_cause"] is False
    (b / ".hydra/attempts/002/diff.json").write_text("[1]")
    assert runs("diff", a, b).code == 4


def test_rebuild(outputs: Path) -> None:
    assert runs("rebuild", "--outputs", outputs).out == f"{outputs}/catalogue.sqlite: 2 runs, 3 checkpoints\n"
    (next(outputs.glob("runs/*-a")) / "run.json").write_bytes(b"{")
    found = runs("rebuild", "--outputs", outputs, "--json").json
    assert (found["runs"], found["checkpoints"], len(found["unreadable"])) == (1, 1, 1)
    listed = runs("list", "--outputs", outputs)
    assert len(listed.lines) == 2
    assert "1 run cannot be read in full" in listed.err
    assert runs("rebuild", "--outputs", outputs / "nowhere").code == 2
