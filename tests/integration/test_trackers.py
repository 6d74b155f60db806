"""Real trainings with trackers: each row there once after kills, and the training as if there were none."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.runs import Lab, assert_same_end, events, manifests, record, rows
from support.wandb_server import WandbServer

from dino_exp.loggers.wandb_file import history, run_files

BOTH = ("logger=[tensorboard,wandb]", "logger.wandb=offline")
NOBODY = "http://127.0.0.1:9"  # the port of discard, at which nobody listens
KEY = "0123456789" * 4


def wait_for_rows(run_of: Lab, number: int) -> None:
    deadline = time.monotonic() + 60
    while not (run_of.runs() and rows_so_far(run_of.runs()[-1]) >= number):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rows_so_far(run: Path) -> int:
    return (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0


def assert_tensorboard_has_each_row_once(run: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    for name in ("loss", "lr", "kl", "init_knn_top1", "knn_top1"):
        expected = [(row["step"], np.float32(row[name])) for row in rows(run) if name in row]
        assert not expected or [(event.step, event.value) for event in found.Scalars(name)] == expected
    for name in found.Tags()["histograms"]:
        steps = [event.step for event in found.Histograms(name)]
        assert steps in ([0, 22, 44], [22, 44])  # the first one may have been waiting when the process was killed


def assert_wandb_has_each_row_once(run: Path) -> None:
    found = [row for file in run_files(run / "wandb", "offline-run") for row in history(file)]
    assert [step for step, _ in found] == [row["step"] for row in rows(run)]
    for (_, values), row in zip(found, rows(run), strict=True):
        assert {name: values[name] for name in row if name != "step"} == {k: v for k, v in row.items() if k != "step"}
    (id_of_all,) = {file.name.removeprefix("run-").removesuffix(".wandb") for file in run.glob("wandb/*/run-*.wandb")}
    assert record(run)["trackers"] == {"wandb": {"id": id_of_all}}
    assert id_of_all == run.name


@pytest.mark.slow
def test_each_row_is_there_once_after_a_kill_and_the_training_ends_in_the_same_bits(lab: Lab) -> None:
    lab.train("run.variant=plain")
    plain = lab.only_run()
    assert [path for path in plain.iterdir() if path.name in ("tensorboard", "wandb")] == []
    settings = (*BOTH, "logger.histogram_every_epochs=1", "run.variant=tracked")
    tracked = plain.with_name(plain.name.replace("plain", "tracked"))
    attempt = lab.fork(*settings)
    while rows_so_far(tracked) < 30:
        assert not attempt.ends_within(0.01)
    attempt.kill()
    attempt.wait()
    printed = lab.train(*settings)
    assert "warning" not in printed
    assert_same_end(tracked, plain)
    assert_tensorboard_has_each_row_once(tracked)
    assert_wandb_has_each_row_once(tracked)
    assert KEY not in "".join(path.read_text(errors="replace") for path in tracked.glob("*.json*"))


def test_a_server_that_is_not_there_is_said_once(lab: Lab) -> None:
    lab.environment |= {"WANDB_BASE_URL": NOBODY, "WANDB_API_KEY": KEY, "no_proxy": "127.0.0.1"}
    printed = lab.train("logger=wandb", "train.stop_after_steps=8")
    run = lab.only_run()
    assert printed.count("does not take the metrics") == 1
    assert printed.count("could not be asked, and may lack up to 9 of the rows") == 1
    assert [event["kind"] for event in events(run) if event["kind"].startswith("tracker")] == [
        "tracker_down",
        "tracker_behind",
    ]
    assert record(run)["state"] == "stopped"
    written = [path for path in run.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []
    told = lab.cli("runs", "deliver", str(run), code=1)
    assert "does not answer" in told
    lab.cli("runs", "deliver", str(run), "--tensorboard")
    lab.cli("runs", "deliver", str(run), "--tensorboard")
    assert_tensorboard_has_each_row_once(run)


def test_a_tracker_that_a_resume_adds_gets_all_rows_and_the_rest_stays_as_it_was(lab: Lab) -> None:
    lab.train("train.stop_after_steps=4")
    run = lab.only_run()
    lab.settings = ("runtime.threads=1",)  # without the experiment, which the run knows
    lab.train(f"resume={run}", "logger=tensorboard", "train.stop_after_steps=6")
    assert [row["step"] for row in rows(run)] == list(range(7))  # every step, as the run has it, and not every 10
    assert_tensorboard_has_each_row_once(run)


def test_a_missing_package_is_named_before_anything_is_done(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    places = [str(tmp_path / "site"), lab.environment.get("PYTHONPATH", ""), *filter(None, sys.path)]
    lab.environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    attempt = lab.start("logger=tensorboard")
    printed = attempt.communicate(timeout=60)[0]
    assert attempt.returncode == 2
    assert "pip install 'dino-exp[tensorboard]'" in printed
    assert lab.runs() == []


def lose_power(run: Path) -> None:
    """The newest files of both lose their ends, as they do where the machine and not only the process has died."""
    time.sleep(3)  # wandb's process outlives its parent for a moment
    for files in (run_files(run / "wandb", "offline-run"), sorted((run / "tensorboard").iterdir())):
        if files:  # all attempts may have been killed before the tracker began
            data = files[-1].read_bytes()
            files[-1].write_bytes(data[: -min(len(data), 900)])


@pytest.mark.slow
def test_many_kills(lab: Lab) -> None:
    lab.train("run.variant=plain")
    plain = lab.only_run()
    tracked = plain.with_name(plain.name.replace("plain", "tracked"))
    chance = random.Random(7)
    for number in (3, 12, 20, 28, 36, 41):
        attempt = lab.fork(*BOTH, "run.variant=tracked")
        while rows_so_far(tracked) < number:
            assert not attempt.ends_within(0.01)
        time.sleep(chance.uniform(0, 1.5))
        attempt.kill()
        if attempt.wait() == 0:
            break
        if number > 20:
            lose_power(tracked)
    lab.train(*BOTH, "run.variant=tracked")
    lab.cli("runs", "deliver", str(tracked))  # where the last kill came after the run was recorded as complete
    assert_same_end(tracked, plain)
    assert_tensorboard_has_each_row_once(tracked)
    assert_wandb_has_each_row_once(tracked)


@pytest.mark.slow
def test_online_a_killed_run_is_resumed_under_its_id_and_the_server_gets_each_row_once(lab: Lab) -> None:
    with WandbServer() as server:
        lab.environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "no_proxy": "127.0.0.1"}
        for number in (20, 30):
            attempt = lab.fork("logger=wandb")
            wait_for_rows(lab, number)
            time.sleep(0.3 * number % 1)
            attempt.kill()
            attempt.wait()
        printed = lab.train("logger=wandb")
    run = lab.only_run()
    assert "warning" not in printed
    assert list(server.rows) == [run.name] == list(server.finished)
    assert server.finished[run.name] == 0
    found = server.rows[run.name]
    assert [row["_step"] for row in found] == [row["step"] for row in rows(run)]
    assert [row["loss"] for row in found[1:]] == [row["loss"] for row in rows(run)[1:]]
    assert server.config["optimizer"]["value"]["lr"] == 0.003
    assert {"RunResumeStatus", "UpsertBucket"} <= set(server.requests)
    written = [path for path in run.rglob("*") if path.is_file()]
    assert [path for path in written if KEY.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_a_finished_run_is_delivered_without_a_training(lab: Lab) -> None:
    lab.train()
    run = lab.only_run()
    before = rows(run), record(run)["attempts"]
    lab.cli("runs", "deliver", str(run), code=2)  # its settings name none
    for _ in range(2):
        lab.cli("runs", "deliver", str(run), "--tensorboard", "--wandb", "offline")
    assert_tensorboard_has_each_row_once(run)
    assert_wandb_has_each_row_once(run)
    assert len(run_files(run / "wandb", "offline-run")) == 1  # none of the second time, when no row was lacking
    assert (rows(run), record(run)["attempts"]) == before
    owned = run.with_name(f"{run.name}-owned")
    attempt = lab.fork("run.variant=owned")
    while rows_so_far(owned) < 3:
        assert not attempt.ends_within(0.01)
    lab.cli("runs", "deliver", str(owned), "--tensorboard", code=3)
    attempt.kill()
    attempt.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_signals_mean_what_they_mean_without_trackers(lab: Lab, number: int) -> None:
    words = (*BOTH, "train.epochs=20")  # many times what is seen of it before the signal
    attempt = lab.fork(*words)
    wait_for_rows(lab, 12)
    time.sleep(2)  # wandb's own process is there
    started = time.monotonic()
    attempt.kill(number)
    assert attempt.wait() == 128 + number
    assert time.monotonic() - started < 8
    run = lab.only_run()
    assert record(run)["state"] == "preempted"
    last = max(manifests(run))
    owed = manifests(run)[last]["state"]["pending_row"]  # where the signal came before the evaluation of this step
    assert (rows(run)[-1]["step"] if owed is None else owed["step"]) == last
    lab.train(*words)
    assert_tensorboard_has_each_row_once(run)
    assert_wandb_has_each_row_once(run)


@pytest.mark.slow
def test_of_several_ranks_the_first_one_tells(lab: Lab) -> None:
    lab.train_together(2, *BOTH, "logger.histogram_every_epochs=1")
    assert_tensorboard_has_each_row_once(lab.only_run())
    assert_wandb_has_each_row_once(lab.only_run())


@pytest.mark.slow
def test_wandb_settings_that_a_stranger_put_into_a_run_are_not_read(lab: Lab) -> None:
    lab.train("train.stop_after_steps=3")
    run = lab.only_run()
    (run / "wandb").mkdir()
    (run / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:8\nmode = online\n")
    (lab.directory / "settings").write_text(
        f"[default]\nbase_url = {NOBODY}\n"
    )  # of the user, which files may overrule
    lab.environment |= {"WANDB_CONFIG_DIR": str(lab.directory), "WANDB_API_KEY": KEY, "no_proxy": "127.0.0.1"}
    lab.environment.pop("WANDB_BASE_URL", None)
    printed = lab.train("logger=wandb", "train.stop_after_steps=6")
    assert "127.0.0.1:9 does not answer" in printed


@pytest.mark.slow
def test_a_replay_tells_no_tracker(lab: Lab) -> None:
    lab.train(*BOTH)
    run = lab.only_run()
    before = sorted(str(path) for path in run.rglob("*"))
    lab.cli("runs", "reproduce", str(run), "--verify", "3", "--trust")
    assert sorted(str(path) for path in run.rglob("*")) == before
