"""`dino-exp checkpoints prune|pin|unpin` on folders, in this process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_samples import KEEP, cli, contents, make_run, steps_of
from support.checkpoints import KINDS, ToyState, flip, open_manager, pack_of, request
from support.disks import fill, mount, unmount

from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.pins import load_pins
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.cli.owning import own
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.layout import RunPaths

GOLDEN = Path(__file__).parent.parent / "golden" / "cli"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path, 1, 2, 3, 4, 5, 6)


def make_coded_run(outputs: Path, kind: str) -> Path:
    run = make_run(outputs)
    KINDS[kind].save_steps(run / "checkpoints", range(1, 7), keep=KEEP)
    return run


def events(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "time"} for row in read_lines(run / "events.jsonl")]


def golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_a_dry_run_prints_what_would_go_and_why(run: Path) -> None:
    cli("pin", f"{run}@3", "--note", "for the paper")
    before = contents(run)
    found = cli("prune", run, "--dry-run", "--keep-last", 2, "--keep-best", 1)
    assert (found.code, found.err) == (0, "")
    golden("prune.txt", re.sub(r"\d\d\.\d kB", "##.# kB", "\n".join(found.lines)) + "\n")
    assert contents(run) == before


def test_pruning_does_what_the_dry_run_said(run: Path) -> None:
    options = ("--keep-last", 2, "--keep-best", 1, "--json")
    planned = cli("prune", run, "--dry-run", *options).json
    done = cli("prune", run, *options).json
    assert done == {**planned, "dry_run": False}
    assert (done["kept"], done["dropped"]) == ([2, 5, 6], [1, 3, 4])
    assert done["reasons"].keys() == {"1", "2", "3", "4", "5", "6"}
    assert steps_of(run) == done["kept"]
    assert events(run) == [
        *({"kind": "dropped", "step": step, "reason": done["reasons"][str(step)]} for step in done["dropped"]),
        {
            "kind": "pruned",
            "policy": [
                {"rule": "latest", "num": 2},
                {"rule": "pinned"},
                {"rule": "best", "metric": "knn_top1", "mode": "max", "num": 1},
                {"rule": "milestones", "at": ["25%"]},
            ],
            "freed_bytes": done["freed_bytes"],
        },
    ]
    assert not (run / "owner.json").exists()
    again = cli("prune", run, *options).json
    assert (again["dropped"], again["freed_bytes"]) == ([], 0)
    assert len(events(run)) == 4
    assert open_manager(run / "checkpoints", keep=KEEP).restore(ToyState()).manifest.step == 6


def test_without_options_the_recorded_policy_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path, *range(1, 6))
    reader = CheckpointReader(run / "checkpoints")
    newest = replace(reader.manifest(5), policy=[{"rule": "latest", "num": 1}])
    (run / "checkpoints" / "step-000000005.json").write_bytes(manifest_to_bytes(newest))
    found = cli("prune", run)
    assert found.lines[-1].startswith("dropped 4 checkpoints, freed ")
    assert found.lines[-1].endswith("; 1 checkpoint left")
    assert steps_of(run) == [5]


def test_best_by_another_metric(run: Path) -> None:
    for options, says in (
        (("--metric", "knn_top1"), "--keep-best"),
        (("--keep-best", 1, "--metric", "knn_tpo1", "--mode", "max"), "near: knn_top1"),
        (("--keep-best", 1, "--mode", "min"), "--metric"),
        (("--keep-best", 1, "--metric", "knn_top1", "--mode", "up"), "max"),
        (("--keep-last", -1), "keep-last"),
    ):
        found = cli("prune", run, *options)
        assert (found.code, found.out) == (2, "")
        assert says in found.err
    worst = cli("prune", run, "--keep-last", 0, "--keep-best", 1, "--mode", "min", "--metric", "knn_top1", "--json")
    assert worst.json["kept"] == [2, 3, 6]  # 2 is a milestone, 3 the worst, 6 the newest


def test_a_run_in_use_is_refused_with_its_owner_and_can_be_looked_at(run: Path) -> None:
    with own(RunPaths(run), ""):
        before = contents(run)
        found = cli("prune", run, "--keep-last", 1)
        assert (found.code, found.out) == (3, "")
        assert f"pid {os.getpid()}, since" in found.err
        assert "--dry-run" in found.err
        looked = cli("prune", run, "--keep-last", 1, "--dry-run", "--json")
        assert looked.json["dropped"] == [1, 3, 4, 5]
        assert contents(run) == before


def test_damage_is_neither_kept_nor_dropped(run: Path) -> None:
    flip(pack_of(run / "checkpoints", 6))
    (run / "checkpoints" / "step-000000001.json").write_bytes(b"{}")
    found = cli("prune", run, "--keep-last", 1, "--json").json
    assert found["damaged"].keys() == {"1", "6"}
    assert (found["kept"], found["dropped"]) == ([2, 5], [3, 4])  # 5 was read whole, since 6 turned out bad
    printed = cli("prune", run, "--dry-run")
    assert [line.split()[:2] for line in printed.lines if "damaged  " in line] == [["1", "damaged"], ["6", "damaged"]]
    assert any("checkpoints verify" in line for line in printed.lines)


def test_there_is_nothing_to_prune_where_nothing_was_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = contents(run)
    for options in ((), ("--dry-run",)):
        assert cli("prune", run, *options).out == "no checkpoints yet\n"
    assert contents(run) == before
    assert cli("prune", run, "--json").json["kept"] == []


def test_prune_is_about_a_run(run: Path) -> None:
    found = cli("prune", f"{run}@2")
    assert (found.code, found.out) == (2, "")
    assert f"prune {run}" in found.err


def test_pins_are_shown_and_honoured(run: Path) -> None:
    assert cli("pin", f"{run}@1", "--note", "for the paper").out == f"pinned step 1 of {run}: for the paper\n"
    assert cli("list", f"{run}@1", "--json").json[0]["kinds"] == ["pinned"]
    assert cli("show", f"{run}@1", "--json").json["note"] == "for the paper"
    assert re.search(r"pinned because +for the paper", cli("show", f"{run}@1").out)
    again = cli("pin", f"{run}@1", "--note", "for the talk").out
    assert again == f"step 1 of {run} was pinned already: for the paper; the note is now: for the talk\n"
    assert cli("pin", f"{run}@1").out == f"step 1 of {run} is pinned already: for the talk\n"
    assert "pinned step 2" in cli("pin", f"{run}@best").out
    cli("prune", run, "--keep-last", 1, "--keep-best", 0)
    assert steps_of(run) == [1, 2, 6]
    assert cli("unpin", f"{run}@1").out.startswith(f"unpinned step 1 of {run}: for the talk; ")
    assert load_pins(run / "checkpoints") == {2: ""}
    assert [event["kind"] for event in events(run)] == [
        *("pinned", "pinned", "pinned"), *["dropped"] * 3, "pruned", "unpinned",
    ]  # fmt: skip


def test_a_pin_needs_a_checkpoint_and_an_unpin_a_pin(run: Path) -> None:
    before = contents(run)
    for verb, at, code, says in (
        ("pin", "", 2, f"pin {run}@best"),
        ("unpin", "", 2, f"unpin {run}@best"),
        ("pin", "@7", 4, "steps here: 1, 2, 3, 4, 5, 6"),
        ("pin", "@newest", 2, "latest, best or a step"),
        ("unpin", "@7", 2, "not pinned; pinned here: none"),
        ("unpin", "@2", 2, "not pinned; pinned here: none"),
    ):
        found = cli(verb, f"{run}{at}")
        assert (found.code, found.out) == (code, "")
        assert says in found.err
    assert cli("pin", f"{run}@2", "--note", "two\nlines").code == 2
    (run / "checkpoints" / "step-000000001.json").write_bytes(b"{}")
    assert cli("pin", f"{run}@1").code == 4
    after = contents(run)
    after[run / "checkpoints" / "step-000000001.json"] = before[run / "checkpoints" / "step-000000001.json"]
    assert {path for path in after if after[path] != before.get(path)} <= {run / "checkpoints" / "pins.lock"}


def test_a_pin_that_outlived_its_checkpoint_can_be_taken_away(run: Path) -> None:
    cli("pin", f"{run}@1")
    (run / "checkpoints" / "step-000000001.json").unlink()
    assert cli("unpin", f"{run}@1").code == 0
    assert load_pins(run / "checkpoints") == {}


def test_pinning_a_run_in_use_writes_no_event(run: Path) -> None:
    with own(RunPaths(run), ""):
        assert cli("pin", f"{run}@1").code == 0
    assert load_pins(run / "checkpoints") == {1: ""}
    assert not (run / "events.jsonl").exists()


def test_a_training_honours_a_pin_from_its_next_save_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    manager = open_manager(run / "checkpoints", keep=replace(KEEP, rules=KEEP.rules[1:2]), background=True)
    for step in range(1, 5):
        manager.save(ToyState(step), request(step))
        manager.drain()
        if step == 2:
            assert cli("pin", f"{run}@latest", "--note", "live").code == 0
    assert steps_of(run) == [2, 4]


def test_people_who_pin_at_once_lose_no_pin(run: Path) -> None:
    words = [[sys.executable, "-m", "dino_exp", "checkpoints", "pin", f"{run}@{step}"] for step in (1, 2)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [subprocess.Popen(one, env=environment, stdout=subprocess.PIPE) for one in words]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert load_pins(run / "checkpoints") == {1: "", 2: ""}


def test_a_disk_that_is_full_to_the_last_page_is_emptied(tmp_path: Path) -> None:
    """When people prune: no room for owner.json, nor for another line of events.jsonl."""
    mount(tmp_path / "disk", 2_000_000)
    try:
        run = make_run(tmp_path / "disk", 1, 2, 3)
        (run / "events.jsonl").write_text("{}\n" * 1365 + "\n")  # a page, so that a line needs another one
        fill(tmp_path / "disk")
        told = cli("prune", run, "--keep-last", 1, "--keep-best", 0)
        assert told.code == 0, told
        assert "dropped 1 checkpoint, " in told.out
        assert steps_of(run) == [2, 3]
        assert not (run / "owner.json").exists()
    finally:
        unmount(tmp_path / "disk")


def test_milestones_are_thinned_by_hand(tmp_path: Path) -> None:
    run = make_coded_run(tmp_path, "zstd")
    before, options = contents(run), ("--keep-last", 1, "--keep-best", 0)
    planned = cli("prune", run, *options, "--thin", "teacher", "--dry-run")
    assert re.search(r"2 +1 +.*milestone .* thin to teacher +milestone 25% of 8 steps", planned.out)
    assert planned.lines[-1].startswith("4 checkpoints would go, 1 would be thinned, ")
    assert contents(run) == before
    expected = cli("prune", run, *options, "--thin", "teacher", "--dry-run", "--json").json
    done = cli("prune", run, *options, "--thin", "teacher", "--json").json
    assert (done["thinned"], done["kept"], done["dropped"]) == ([2], [2, 6], [1, 3, 4, 5])
    assert expected["thinned"] == [2]
    assert done["freed_bytes"] == pytest.approx(expected["freed_bytes"], rel=0.1)
    sizes = sum(len(data) for path, data in contents(run / "checkpoints").items() if data is not None)
    assert sizes < sum(len(data) for path, data in before.items() if data is not None and "checkpoints" in str(path))
    row = next(row for row in cli("list", run, "--json").json if row["step"] == 2)
    assert (row["resumable"], row["verified"]) == (False, True)
    assert "yes, thinned" in cli("list", run).out
    assert cli("verify", run).code == 0
    assert {event["kind"] for event in events(run)} == {"dropped", "thinned", "pruned"}


def test_damage_that_is_found_while_thinning_is_neither_kept_nor_dropped(tmp_path: Path) -> None:
    run = make_coded_run(tmp_path, "zstd")
    pack = pack_of(run / "checkpoints", 2)
    flip(pack, pack.stat().st_size // 2)
    flip(pack)
    words = ("--keep-last", 1, "--keep-best", 0, "--thin", "teacher")
    shown = cli("prune", shutil.copytree(run, tmp_path / "runs" / f"{run.name}-copy"), *words).out
    assert re.search(r"^ +2 .* damaged ", shown, re.MULTILINE)
    assert "dino-exp checkpoints verify" in shown
    done = cli("prune", run, *words, "--json")
    assert done.code == 0
    assert (done.json["thinned"], done.json["kept"], done.json["damaged"].keys()) == ([], [6], {"2"})
    assert "2" not in done.json["reasons"]


def test_what_others_build_on_is_said_and_freed_by_hand(tmp_path: Path) -> None:
    run = make_coded_run(tmp_path, "delta")
    digests = {row["step"]: row["state_digest"] for row in cli("list", run, "--json").json}
    first = cli("prune", run, "--keep-last", 2, "--keep-best", 0)
    assert first.code == 0
    assert re.fullmatch(r"[\d.]+ kB of dropped ones stay because others build on them; .* --compact", first.lines[-1])
    before = contents(run)
    dry = cli("prune", run, "--keep-last", 2, "--compact", "--dry-run", "--json").json
    assert contents(run) == before
    assert dry["foreign_bytes"] > 0
    done = cli("prune", run, "--keep-last", 2, "--compact", "--json").json
    assert done["rewritten"]
    assert (done["freed_bytes"] > 0, done["foreign_bytes"]) == (True, 0)
    rows = cli("list", run, "--json").json
    assert {row["step"]: row["state_digest"] for row in rows} == {row["step"]: digests[row["step"]] for row in rows}
    assert cli("verify", run).code == 0
    names = {path.name for path in (run / "checkpoints" / "packs").iterdir()}
    assert {int(name[5:14]) for name in names} == {row["step"] for row in rows}
    again = cli("prune", run, "--keep-last", 2, "--compact")
    assert again.lines[-1].startswith("nothing to drop; ")
