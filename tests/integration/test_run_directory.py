"""What lies in a run's directory, and who may write to it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import time

import pytest
from support.runs import Lab, events, manifests, record, rows

FILES = (
    "run.json", "config.yaml", "config.canonical.json", ".hydra/config.yaml", ".hydra/overrides.yaml", "code/git.json",
    "environment.json", "events.jsonl", "metrics.jsonl", "train.log", "lock", "checkpoints/registry.json",
)  # fmt: skip


def test_files_and_hashes_of_a_finished_run(lab: Lab) -> None:
    printed = lab.train()
    run = lab.only_run()
    for name in FILES:
        assert (run / name).is_file(), name
    made = record(run)
    canonical = (run / "config.canonical.json").read_text()
    assert made["config_hash"] == "c1:" + hashlib.sha256(canonical.encode()).hexdigest()
    assert run.name == f"vit_nano-{made['config_hash'][3:11]}-{made['code']['id'][:8]}"
    for manifest in manifests(run).values():
        said = manifest["record"]
        assert said["config_hash"] == made["config_hash"]
        assert said["config"] == canonical
        assert said["code_id"] == made["code"]["id"]
        assert said["git_commit"] == made["code"]["commit"]
        assert said["data_fingerprint"] == made["data_fingerprint"]
    for text in (run.name, made["config_hash"], str(run), f"resume={run}", "k = 20", "1 label a class"):
        assert text in printed
    assert made["state"] == "completed"
    assert made["best"]["metric"] == "knn_top1"
    assert not (run / "FAILED.txt").exists()
    assert not any(lab.directory.glob("*.yaml"))
    assert sorted(path.name for path in lab.directory.iterdir()) == ["outputs"]


def test_rows_hold_what_people_follow(lab: Lab) -> None:
    lab.train("train.stop_after_steps=23")
    made = [json.loads(line) for line in (lab.only_run() / "metrics.jsonl").read_text().splitlines()]
    assert {"init_knn_top1", "pixel_knn_top1", "init_knn_1shot"} <= made[0].keys()
    health = {
        "loss",
        "lr",
        "entropy_ratio",
        "kl",
        "feature_std",
        "center_norm",
        "prototypes_used",
        "grad_norm",
        "update_ratio",
    }
    assert health <= made[1].keys()
    assert {"images_per_sec", "data_wait_share"} <= made[1]["wall"].keys()
    evaluated = made[22]
    assert {"knn_top1", "knn5_top1", "knn_10shot", "knn_1shot", "val_loss"} <= evaluated.keys()
    assert not any(name.startswith("knn") for row in (*made[:22], made[23]) for name in row)


def test_the_first_attempts_record_is_never_rewritten(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2", "run.note=first")
    run = lab.only_run()
    kept = {path: path.read_bytes() for path in (run / ".hydra").iterdir() if path.is_file()}
    kept[run / "config.yaml"] = (run / "config.yaml").read_bytes()
    lab.train("train.stop_after_steps=4", "checkpoint=best", "run.tags=[later]")
    assert all(path.read_bytes() == content for path, content in kept.items())
    again = run / ".hydra" / "attempts" / "002"
    assert "checkpoint=best" in (again / "overrides.yaml").read_text()
    changed = {change["key"]: change["verdict"] for change in json.loads((again / "diff.json").read_text())}
    assert changed["checkpoint.keep.best"] == "allowed"
    made = record(run)
    assert (len(made["attempts"]), made["tags"], made["note"]) == (2, ["later"], "first")
    at = ("--outputs", str(lab.outputs))
    assert [row["path"] for row in json.loads(lab.cli("runs", "list", "--tag", "later", "--json", *at))] == [str(run)]


def test_spelled_out_settings_are_the_same_run(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2", "optimizer.lr=3e-3")
    lab.train("train.stop_after_steps=3", "optimizer.lr=0.003", "model.drop_path_rate=0", "runtime.workers=1")
    assert len(lab.runs()) == 1
    lab.train("train.stop_after_steps=2", "optimizer.lr=0.0031")
    assert len(lab.runs()) == 2


def test_a_second_process_is_refused_with_the_owners_name(lab: Lab) -> None:
    first = lab.start("train.epochs=400")
    wait_for_rows(lab, 2)
    started = time.monotonic()
    printed = lab.train("train.epochs=400", "runtime.lock_wait_secs=1", code=3)
    assert time.monotonic() - started < 60
    assert str(first.pid) in printed
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 143
    assert len(events(lab.only_run(), "attempt_started")) == 1


def test_a_killed_owner_is_taken_over_at_once(lab: Lab) -> None:
    first = lab.start("train.epochs=400")
    wait_for_rows(lab, 2)
    first.kill()
    first.communicate()
    assert record(lab.only_run())["state"] == "running"
    lab.train("train.epochs=400", "train.stop_after_steps=3", "runtime.lock_wait_secs=0")
    assert [attempt["outcome"] for attempt in record(lab.only_run())["attempts"]] == ["interrupted", "stopped"]


@pytest.mark.slow
def test_many_starts_of_one_key_make_one_run(lab: Lab) -> None:
    processes = [
        lab.start("runtime.lock_wait_secs=0.5", "train.epochs=60", "train.stop_after_steps=150") for _ in range(3)
    ]
    codes = sorted(process.wait(timeout=200) for process in processes)
    for process in processes:
        process.communicate()
    assert codes[0] == 0
    assert set(codes) <= {0, 3}
    assert record(lab.only_run())["step"] == 150


def wait_for_rows(lab: Lab, num: int) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if lab.runs() and (lab.only_run() / "metrics.jsonl").exists() and len(rows(lab.only_run())) >= num:
            return
        time.sleep(0.05)
    pytest.fail("the training wrote no rows")


def test_a_directory_of_ones_own(lab: Lab) -> None:
    mine = lab.directory / "of my own"
    lab.environment["DINO_EXP_RUN_DIR"] = str(mine)
    lab.train("train.stop_after_steps=2")
    lab.train("train.stop_after_steps=4")
    assert record(mine)["step"] == 4
    assert not lab.outputs.exists()
    refused = lab.train("train.stop_after_steps=4", "optimizer.lr=1", code=3)
    assert "optimizer.lr" in refused
    assert f"env -u DINO_EXP_RUN_DIR python -m dino_exp.train 'fork={mine}@4'" in refused
    assert f"dino-exp checkpoints list '{mine}'" in lab.train("train.stop_after_steps=4")


def test_a_bug_leaves_its_traceback_and_an_emergency_checkpoint(lab: Lab) -> None:
    (lab.directory / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'dino_exp.training.loop':\n"
        "            sys.meta_path.remove(self)\n"
        "            import dino_exp.training.step as step\n"
        "            real = step._compute\n"
        "            def broken(state, batch, *rest):\n"
        "                if batch.step == 5:\n"
        "                    raise ZeroDivisionError('planted')\n"
        "                return real(state, batch, *rest)\n"
        "            step._compute = broken\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    lab.environment["PYTHONPATH"] = os.pathsep.join([str(lab.directory), os.environ.get("PYTHONPATH", "")])
    printed = lab.train("checkpoint.save.every_epochs=null", code=1)
    run = lab.only_run()
    assert "ZeroDivisionError: planted" in printed
    assert "planted" in (run / "FAILED.txt").read_text()
    assert record(run)["state"] == "failed"
    assert "planted" in record(run)["attempts"][0]["error"]
    assert manifests(run)[4]["reasons"] == ["emergency"]
    listed = json.loads(lab.cli("checkpoints", "list", str(run), "--json"))
    assert listed[-1]["kinds"] == ["latest", "emergency"]


def test_a_non_finite_loss_names_step_checkpoint_and_the_line_to_type(lab: Lab) -> None:
    printed = lab.train("optimizer.lr=1e30", "checkpoint.save.every_steps=1", "optimizer.clip_grad=null", code=1)
    run = lab.only_run()
    assert "is not finite" in printed
    assert f"fork={run}@" in printed
    assert "Traceback" not in printed
    assert record(run)["state"] == "failed"
    named = int(printed.split("the last healthy checkpoint is that of step ")[1].split(";")[0])
    assert named in manifests(run)


COLLAPSING = (
    "experiment=digits", "loss.use_bn=false", "train.epochs=18", "evaluation.every_epochs=null", "runtime.threads=1",
)  # fmt: skip


@pytest.mark.slow
def test_collapse_is_named_and_says_what_to_change(lab: Lab) -> None:
    lab.settings = COLLAPSING
    printed = lab.train(code=1)
    assert "collapse (uniform)" in printed
    assert "loss.use_bn=true" in printed
    assert record(lab.only_run())["state"] == "failed"


@pytest.mark.slow
def test_collapse_may_be_warned_about_only(lab: Lab) -> None:
    lab.settings = COLLAPSING
    printed = lab.train("train.on_collapse=warn", "train.stop_after_epochs=11")
    assert printed.count("collapse (uniform)") == 1
    assert record(lab.only_run())["state"] == "stopped"


@pytest.mark.slow
def test_rows_that_cannot_be_written_leave_a_run_that_continues(lab: Lab) -> None:
    plant(lab, "dino_exp.runs.rows", "append", "self._num_rows == 7", "OSError(28, 'No space left on device')")
    printed = lab.train("checkpoint.save.every_steps=3", code=1)
    run = lab.only_run()
    assert "No space left" in printed
    assert "Traceback" not in printed
    assert max(manifests(run)) == 7
    assert manifests(run)[7]["state"]["pending_row"]["step"] == 7
    del lab.environment["PYTHONPATH"]
    lab.train()
    assert [row["step"] for row in rows(run)] == list(range(45))
    assert not (run / "FAILED.txt").exists()


def plant(lab: Lab, module: str, method: str, condition: str, error: str) -> None:
    """Make `RowWriter.<method>` of later trainings raise `error` where `condition` holds."""
    (lab.directory / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == 'dino_exp.training.loop':\n"
        "            sys.meta_path.remove(self)\n"
        f"            import {module} as planted\n"
        f"            real = planted.RowWriter.{method}\n"
        "            def broken(self, *args):\n"
        f"                if {condition}:\n"
        f"                    raise {error}\n"
        "                return real(self, *args)\n"
        f"            planted.RowWriter.{method} = broken\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    lab.environment["PYTHONPATH"] = os.pathsep.join([str(lab.directory), os.environ.get("PYTHONPATH", "")])


def test_lost_checkpoints_are_not_begun_again_in_silence(lab: Lab) -> None:
    lab.train("train.stop_after_steps=5")
    run = lab.only_run()
    kept = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    assert "no checkpoint is left" in lab.train("train.stop_after_steps=7", code=4)
    assert (run / "metrics.jsonl").read_bytes() == kept


def test_another_runs_checkpoints_are_not_taken_over(lab: Lab) -> None:
    lab.train("train.stop_after_steps=5")
    run = lab.only_run()
    (run / "run.json").unlink()
    lab.environment["DINO_EXP_RUN_DIR"] = str(run)
    before = (run / "config.yaml").read_bytes()
    assert "no run.json" in lab.train("optimizer.lr=1e-3", code=3)
    assert (run / "config.yaml").read_bytes() == before


def test_nothing_saved_is_said_and_a_stop_is_a_stop(lab: Lab) -> None:
    lab.train("checkpoint=none", "train.stop_after_steps=2")
    run = lab.only_run()
    assert record(run)["step"] == 2
    assert "Nothing to do" in lab.train("checkpoint=none", "train.stop_after_steps=2")
    assert "begins again where it began" in lab.train("checkpoint=none", "train.stop_after_steps=3")
    assert [event["reached"] for event in events(lab.only_run(), "began_again")] == [2]
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]


def test_lost_exactness_is_inherited(lab: Lab) -> None:
    lab.train("train.stop_after_steps=2")
    lab.train("train.stop_after_steps=4", "runtime.threads=2")
    lab.train("train.stop_after_steps=6")
    assert [attempt["exact"] for attempt in record(lab.only_run())["attempts"]] == [True, False, False]


def test_a_process_that_lost_its_run_writes_nothing_more(lab: Lab) -> None:
    process = lab.start("train.epochs=400", "checkpoint.save.every_steps=5")
    wait_for_rows(lab, 3)
    run = lab.only_run()
    owner = json.loads((run / "owner.json").read_text())
    stolen = run / "stolen.json"
    stolen.write_text(json.dumps({**owner, "token": "f" * len(owner["token"])}))
    stolen.replace(run / "owner.json")  # in one step, as a real owner does it
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert record(run)["state"] == "running"
    assert not (run / "FAILED.txt").exists()


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_the_training(lab: Lab) -> None:
    words = shlex.join(lab.command())
    subprocess.run(f"{words} | head -1", shell=True, check=True, cwd=lab.directory, env=lab.environment, timeout=200)
    assert record(lab.only_run())["state"] == "completed"


def test_term_while_waiting_for_the_owner(lab: Lab) -> None:
    first = lab.start("train.epochs=400")
    wait_for_rows(lab, 2)
    second = lab.start("train.epochs=400")
    time.sleep(4)
    second.send_signal(signal.SIGTERM)
    printed, _ = second.communicate(timeout=30)
    first.kill()
    first.communicate()
    assert second.returncode in (143, -15)
    assert second.returncode == -15 or "stopped while waiting" in printed


def test_files_in_the_way_are_one_message(lab: Lab) -> None:
    (lab.directory / "file").write_text("")
    printed = lab.train(f"paths.outputs={lab.directory / 'file'}", code=1)
    assert "Traceback" not in printed
    assert "file" in printed
    lab.train("train.stop_after_steps=1")
    run = lab.only_run()
    (run / "config.yaml").unlink()
    lab.settings = ()
    assert "config.yaml" in lab.train(f"resume={run}", code=3)


def test_help_into_a_closed_pipe_is_silent(lab: Lab) -> None:
    lab.settings = ()
    words = shlex.join([*lab.command()[:3], "--help"])
    done = subprocess.run(
        f"{words} | head -1", shell=True, check=True, env=lab.environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("Train DINO")
    assert done.stderr == ""
