"""`dino-exp runs` about real trainings: kept up while they train, and nothing of it needs torch or leaves a file."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.runs import Lab, events, manifests, record


def listed(lab: Lab, *words: str) -> list[dict[str, object]]:
    return json.loads(lab.cli("runs", *words, "--outputs", str(lab.outputs), "--json"))


def test_a_training_keeps_the_catalogue_up(lab: Lab) -> None:
    lab.train("run.tags=[x]")
    (run,) = lab.runs()
    with closing(sqlite3.connect(lab.outputs / "catalogue.sqlite")) as database:
        state, step = database.execute("SELECT state, step FROM runs").fetchone()
        steps = [step for (step,) in database.execute("SELECT step FROM checkpoints ORDER BY step")]
    assert (state, step, steps) == ("completed", 44, sorted(manifests(run)))
    (row,) = listed(lab, "list", "--tag", "x", "--where", "model=vit_nano")
    made = record(run)
    for name in ("run_key", "config_hash", "group_hash", "data_fingerprint", "step", "metrics", "best", "state"):
        assert row[name] == made[name]
    assert row["path"] == str(run)
    (best,) = listed(lab, "best")
    code = best["best"].pop("code")
    assert (best["best"], code) == (made["best"], best["code"])
    assert "knn_top1" in lab.cli("runs", "show", "last", "--outputs", str(lab.outputs))


def test_a_fork_shows_its_lineage_and_what_it_changed(lab: Lab) -> None:
    lab.train("train.stop_after_steps=20")
    (parent,) = lab.runs()
    lab.settings = ()
    lab.train(f"fork={parent}@latest", "optimizer.lr=1e-3", "train.stop_after_steps=21")
    child = next(run for run in lab.runs() if run != parent)
    shown = json.loads(lab.cli("runs", "show", str(child), "--json"))
    assert shown["ancestors"] == [{"run_key": parent.name, "step": 20, "is_here": True}]
    assert json.loads(lab.cli("runs", "show", str(parent), "--json"))["children"] == [child.name]
    found = json.loads(lab.cli("runs", "diff", str(parent), str(child), "--json"))
    changed = {row["key"]: (row["a"], row["b"]) for row in found["differences"] if row["section"] == "settings"}
    assert changed["optimizer.lr"] == (0.003, 0.001)
    assert "the same code" in lab.cli("runs", "diff", str(parent), str(child), "--code")


def test_the_line_that_starts_a_run_finds_it_finished(lab: Lab) -> None:
    mine = lab.directory / "my settings" / "extra"
    mine.mkdir(parents=True)
    (mine / "short.yaml").write_text("# @package _global_\ntrain:\n  stop_after_steps: 2\n")
    lab.train(f"--config-dir={mine.parent}", "+extra=short", "run.note='two words'")
    line = lab.cli("runs", "show", "last", "--outputs", str(lab.outputs), "--command")
    line = line.replace("python", sys.executable, 1)
    done = subprocess.run(
        line, shell=True, check=True, cwd=lab.directory, env=lab.environment, text=True, capture_output=True
    )
    assert "Nothing to do" in done.stdout
    assert len(lab.runs()) == 1


def test_reading_imports_no_torch_and_creates_no_file(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    run = str(lab.only_run())
    before = sorted(lab.directory.rglob("*"))
    for words in (
        ["list"],
        ["best", "--metric", "loss"],
        ["best", "--metric=loss", "--group"],
        ["show", run],
        ["diff", run, run],
    ):
        program = (
            "import sys\n"
            f"sys.argv[1:] = ['runs', *{words!r}, '--outputs', {str(lab.outputs)!r}]\n"
            "from dino_exp.cli.app import run\n"
            "assert run() == 0\n"
            "assert not {'torch', 'hydra', 'omegaconf', 'git'} & sys.modules.keys()\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, env=lab.environment, stdout=subprocess.PIPE)
    assert sorted(lab.directory.rglob("*")) == before


def test_a_disk_that_takes_no_catalogue_stops_no_training(lab: Lab) -> None:
    lab.outputs.mkdir()
    (lab.outputs / "catalogue.sqlite").mkdir()
    printed = lab.train("train.stop_after_steps=2")
    assert printed.count("catalogue.sqlite: not kept up") == 1
    assert [row["step"] for row in listed(lab, "list")] == [2]


@pytest.mark.slow
def test_where_the_catalogue_cannot_be_locked_the_runs_are_read(lab: Lab) -> None:
    """SQLite's locks are refused by the system, as some network disks do; trainings and readers say so once each."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler, to make a disk without locks")
    library = lab.directory / "no_locks.so"
    source = Path(__file__).parents[1] / "support" / "no_locks.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    lab.train("train.stop_after_steps=2")  # the catalogue knows this one
    lab.environment["LD_PRELOAD"] = str(library)
    training = lab.start("train.stop_after_steps=3")
    printed, _ = training.communicate()
    assert training.returncode == 0, printed
    assert printed.count("catalogue.sqlite: not kept up") == 1
    command = [sys.executable, "-m", "dino_exp", "runs", "list", "--outputs", str(lab.outputs), "--json"]
    done = subprocess.run(command, check=True, env=lab.environment, capture_output=True, text=True)
    assert [row["step"] for row in json.loads(done.stdout)] == [3]
    assert done.stderr.count("catalogue.sqlite: not used") == 1
    assert "Traceback" not in done.stderr + printed


@pytest.mark.slow
def test_sixteen_that_start_at_once_are_sixteen_runs(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    started = [lab.start(f"seed={seed}", "train.stop_after_steps=3") for seed in range(16)]
    for process in started:
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
    assert [row["state"] for row in listed(lab, "list")] == ["stopped"] * 16
    for run in lab.runs():
        assert sorted(manifests(run)) == [3]
        assert [event["kind"] for event in events(run, "attempt_ended")] == ["attempt_ended"]
