"""`dino-exp checkpoints list|show|verify` on folders, in this process."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_samples import cli, contents, make_run
from support.checkpoints import flip, pack_of

from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.reader import CheckpointReader

VERBS = ("list", "show", "verify", "pin", "unpin", "prune")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, 1, 2, 3, 4, 5, 6)


def test_verify_names_the_parts_and_the_next_command(run: Path) -> None:
    checkpoints = run / "checkpoints"
    chunk = CheckpointReader(checkpoints).manifest(6).tensors["student.weight"].chunks[0]
    flip(checkpoints / "packs" / chunk.pack, chunk.start)
    found = cli("verify", run)
    assert (found.code, found.err) == (4, "")
    assert found.lines[:2] == [
        f"damage in {run}:",
        "  step 6: student weight damaged (1 tensor); optimizer, loss fine",
    ]
    assert "student.weight in step-000000006." in found.lines[2]
    assert found.lines[-1] == (
        f"  next: python -m dino_exp.train resume={run}   # moves 6 to quarantine/ and goes on from step 5"
    )
    verdict = cli("verify", run, "--json")
    assert verdict.code == 4
    assert verdict.json.keys() == {"ok", "checked", "damaged"}
    (place,) = verdict.json["damaged"]
    assert place == {"step": 6, "tensor": "student.weight", "pack": chunk.pack, "reason": found.lines[2].strip()}
    (line,) = cli("verify", f"{run}@5").lines
    state = cli("show", f"{run}@5", "--json").json["state_digest"]
    assert line == f"all good: 1 checkpoint of {run} checked, every byte; its state is {state}"
    assert cli("verify", f"{run}@5", "--json").json["state_digest"] == state


@pytest.mark.parametrize(
    ("bad", "state", "says"),
    [
        ([3], "stopped", "goes on from step 6, the newest, which is good"),
        ([5, 6], "stopped", "moves 5, 6 to quarantine/ and goes on from step 4"),
        ([3, 6], "completed", "@5   # a new run from its newest good one: it is finished"),
        ([1, 2, 3, 4, 5, 6], "stopped", "none of its checkpoints is good"),
    ],
)
def test_what_to_do_about_damage(bad: list[int], state: str, says: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, *range(1, 7), state=state)
    for step in bad:
        (run / "checkpoints" / f"step-{step:09d}.json").write_bytes(b"{}")
    assert says in cli("verify", run).lines[-1]


def test_the_next_command_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my outputs", 1, 2)
    (run / "checkpoints" / "step-000000002.json").write_bytes(b"{}")
    assert f"'resume={run}'   # moves 2" in cli("verify", run).lines[-1]
    assert cli("list", run).lines[-1].endswith(f"dino-exp checkpoints verify '{run}'")


def test_all_runs_are_read_whatever_ails_one(tmp_path: Path) -> None:
    good = make_run(tmp_path, 1, 2, variant="good")
    worn = make_run(tmp_path, 1, 2, 3, variant="worn")
    newer = make_run(tmp_path, 1, variant="newer")
    led = make_run(tmp_path, variant="led-elsewhere")
    flip(pack_of(worn / "checkpoints", 3))
    for name in ("registry.json", "pins.json"):
        (worn / "checkpoints" / name).write_text("{")
    (worn / "run.json").write_text("{")
    (good / "run.json").unlink()
    manifest = CheckpointReader(newer / "checkpoints").manifest(1)
    (newer / "checkpoints" / "step-000000001.json").write_bytes(manifest_to_bytes(replace(manifest, format_version=3)))
    (led / "checkpoints").symlink_to(good / "checkpoints")
    before = contents(tmp_path)
    verdict = cli("verify", "--all", "--outputs", tmp_path, "--json")
    assert verdict.code == 4
    found = verdict.json
    assert [(row["run"], row["ok"], row["checked"]) for row in found["runs"]] == [
        (str(good), True, 2), (str(led), False, 0), (str(newer), False, 0), (str(worn), False, 3),
    ]  # fmt: skip
    assert (found["ok"], found["checked"]) == (False, 5)
    assert found["damaged"] == [place for row in found["runs"] for place in row["damaged"]]
    assert [(place["run"], place["step"]) for place in found["damaged"]] == [
        (str(led), None), (str(newer), None), (str(worn), 3), (str(worn), None),
    ]  # fmt: skip
    printed = cli("verify", "--all", "--outputs", tmp_path)
    assert printed.lines[-1] == "5 checkpoints of 4 runs checked, every byte: damage in 3 runs"
    assert str(good) not in printed.out.replace(str(good / "checkpoints"), "")
    assert contents(tmp_path) == before


def test_verify_all_or_one(run: Path, tmp_path: Path) -> None:
    assert cli("verify", "--all", "--outputs", tmp_path).lines == [
        "all good: 6 checkpoints of 1 run checked, every byte"
    ]
    for words in (("verify",), ("verify", "--all", str(run))):
        found = cli(*words)
        assert (found.code, found.out) == (2, "")
        assert "Expected a run or --all" in found.err
    assert "no run in" in cli("verify", "--all", "--outputs", tmp_path / "nowhere").err


def test_a_run_that_has_saved_nothing_is_not_called_good(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for words in (("verify", run), ("verify", run, "--json"), ("show", run), ("pin", f"{run}@latest")):
        found = cli(*words)
        assert (found.code, found.out) == (4, "")
        assert "nothing has been saved yet" in found.err
        assert found.err.endswith(f"To go on with it: python -m dino_exp.train resume={run}\n")
    found = cli("verify", "--all", "--outputs", tmp_path)
    assert (found.code, found.out) == (0, "nothing to check: 1 run below, and no checkpoint\n")


def test_list_is_for_people(run: Path) -> None:
    cli("pin", f"{run}@3")
    found = cli("list", run)
    assert found.lines[0].split() == [
        "step", "epoch", "kinds", "knn_top1", "size", "stored", "alone", "age", "verified", "state",
    ]  # fmt: skip
    assert "\x1b" not in found.out
    rows = cli("list", run, "--json").json
    kinds = [line.split()[2:-10] for line in found.lines[1:7]]
    assert [line.split()[0] for line in found.lines[1:7]] == [str(row["step"]) for row in rows]
    assert kinds[2] == ["pinned"]
    assert found.lines[7].startswith("6 checkpoints: ")
    assert len(cli("list", f"{run}@best").lines) == 2


def test_kinds_are_coloured_on_a_terminal_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32mlatest\x1b[0m" in cli("list", run).out
    assert "\x1b[31mdrop\x1b[0m" in cli("prune", run, "--dry-run", "--keep-last", 1).out
    assert "\x1b" not in cli("list", run, "--json").out


def test_what_cannot_be_listed_is_counted(run: Path, tmp_path: Path) -> None:
    (run / "checkpoints" / "step-000000001.json").write_bytes(b"{}")
    assert cli("list", run).lines[-1] == f"1 checkpoint cannot be read; why: dino-exp checkpoints verify {run}"
    assert cli("list", make_run(tmp_path / "other")).out == "no checkpoints yet\n"


def test_show_tells_everything(run: Path) -> None:
    found = cli("show", f"{run}@2").out
    for says in (
        r"saved because +every 1 steps", r"commit +f{40}", r"config +c1:0{64}", r"kinds +best milestone",
        r"policy +keep last 9; pinned; best 1 by knn_top1 \(max\); milestones 25%", r"metrics +value", r"knn_top1 +0.2",
        r"step-000000002\.a001\.r00000\.safetensors +\d", r"student +2 +28 B", r"written by +attempt 1, 1 process",
    ):  # fmt: skip
        assert re.search(says, found), says
    assert "student.weight" not in found
    assert "student.weight" in cli("show", f"{run}@2", "--tensors").out
    shown = cli("show", f"{run}@2", "--json").json
    assert shown["packs"][0]["name"] == "step-000000002.a001.r00000.safetensors"
    assert shown["record"]["git_commit"] == "f" * 40
    assert (shown["note"], shown["healthy"], shown["parent"]) == (None, True, None)


def test_a_manifest_can_be_named_by_its_path(run: Path) -> None:
    path = run / "checkpoints" / "step-000000002.json"
    assert cli("show", path, "--json").json == cli("show", f"{run}@2", "--json").json
    assert "pinned step 2" in cli("pin", path).out
    assert cli("unpin", path).code == 0
    found = cli("show", path.with_name("step-000000009.json"))
    assert (found.code, found.out) == (4, "")
    assert "steps here: 1, 2, 3, 4, 5, 6" in found.err


@pytest.mark.parametrize("verb", VERBS)
def test_a_run_that_is_not_there_is_one_message_that_says_what_is(verb: str, run: Path, tmp_path: Path) -> None:
    found = cli(verb, f"{run.name[:-2]}zz@best" if verb not in ("prune",) else "zz", "--outputs", tmp_path)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("dino-exp: ")
    assert run.name in found.err or "shows the runs" in found.err


def test_a_manifest_is_known_by_its_path_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, 1, 2)
    (tmp_path / "link").symlink_to(run / "checkpoints")
    for words in (run / "checkpoints" / "step-000000001.json", tmp_path / "link" / "step-000000001.json"):
        assert cli("show", words, "--json").json["step"] == 1
    monkeypatch.chdir(run / "checkpoints")
    for typed in ("step-000000001.json", "./step-000000001.json"):
        assert cli("show", typed, "--json").json["step"] == 1


def test_a_closed_output_is_no_traceback(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    words = [sys.executable, "-m", "dino_exp", "checkpoints", "list", str(run)]
    done = subprocess.run(
        ["sh", "-c", f"exec {shlex.join(words)} >&-"], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_no_verb_needs_torch_and_looking_creates_nothing(run: Path) -> None:
    words = [
        *(
            ["list", str(run)],
            ["show", str(run)],
            ["verify", str(run)],
            ["verify", "--all", "--outputs", str(run.parents[1])],
        ),
        *(["prune", str(run), "--dry-run"], ["pin", f"{run}@1"], ["unpin", f"{run}@1"], ["prune", str(run)]),
    ]
    program = (
        "import json, os, sys\n"
        "from dino_exp.cli.app import run\n"
        "def files(): return sorted(os.path.join(d, f) for d, _, fs in os.walk(sys.argv[1]) for f in fs)\n"
        "folder, every = sys.argv[1], json.loads(sys.argv[2])\n"
        "before = files()\n"
        "for number, words in enumerate(every):\n"
        "    sys.argv = ['dino-exp', 'checkpoints', *words]\n"
        "    assert run() == 0, words\n"
        "    sys.argv = [folder, folder]\n"
        "    assert number > 4 or files() == before, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", program, str(run), json.dumps(words)],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
    )
