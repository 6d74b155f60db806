"""Disks that are full or stuck while a real training saves: what was committed stands, and the run ends the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.runs import Lab, assert_same_end, events, manifests, record, rows

PLANT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "dino_exp.training.loop":
            sys.meta_path.remove(self)
            plant()
def plant():
    import errno, os, pathlib, time
    from dino_exp.fsio import Files
    here, real = pathlib.Path({here!r}), Files.create
    def create(self, path):
        if path.suffix == ".safetensors":
            if (here / "full").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if (here / "stuck").exists():
                (here / "reached").touch()
            while (here / "stuck").exists():
                time.sleep(0.01)
        return real(self, path)
    Files.create = create
sys.meta_path.insert(0, Finder())
"""


class Disk:
    """Makes the disk of later attempts full, or stuck, while a file of that name exists."""

    def __init__(self, lab: Lab) -> None:
        self.here = lab.directory
        (lab.directory / "sitecustomize.py").write_text(PLANT.format(here=str(lab.directory)))
        lab.environment["PYTHONPATH"] = os.pathsep.join([str(lab.directory), os.environ.get("PYTHONPATH", "")])

    def be(self, state: str) -> None:
        (self.here / state).touch()

    def mend(self) -> None:
        for name in ("full", "stuck", "reached"):
            (self.here / name).unlink(missing_ok=True)

    def wait_until_stuck(self) -> None:
        deadline = time.monotonic() + 100
        while not (self.here / "reached").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One for all tests here, each with runs of its own."""
    return Lab(tmp_path_factory.mktemp("trouble"))


@pytest.fixture(scope="module")
def disk(lab: Lab) -> Disk:
    """The disk of all attempts here; one that ran through undisturbed lies on it as `reference`."""
    disk = Disk(lab)
    lab.train("run.variant=reference")
    return disk


def of(lab: Lab, variant: str) -> Path:
    (reference,) = (run for run in lab.runs() if run.name.endswith("reference"))
    return reference.with_name(reference.name.replace("reference", variant))


def wait_for_rows(run: Path, num: int) -> None:
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_bytes().count(b"\n") < num:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_disk_does_not_stop_the_training_and_is_no_success(lab: Lab, disk: Disk) -> None:
    disk.be("full")
    printed = lab.train("run.variant=full", code=1)
    run = of(lab, "full")
    assert "warning: the checkpoint of step 11 was not saved: [Errno 28] No space left on device" in printed
    assert "no checkpoint exists; training goes on" in printed
    assert "training came to step 44, and its last checkpoint could not be saved" in printed
    assert "Traceback" not in printed
    assert (record(run)["state"], record(run)["failed_save"]["step"], record(run)["step"]) == ("failed", 44, 0)
    assert [event["step"] for event in events(run, "save_failed")] == [11, 22, 33, 44]
    assert [row["step"] for row in rows(run)] == list(range(45))
    assert not list((run / "checkpoints" / "packs").iterdir())
    disk.mend()
    lab.train("run.variant=full")
    assert (record(run)["state"], record(run)["failed_save"]) == ("completed", None)
    assert_same_end(run, of(lab, "reference"))


def test_a_disk_that_was_full_for_a_while_is_forgiven(lab: Lab, disk: Disk) -> None:
    disk.be("full")
    attempt = lab.fork("run.variant=while", "checkpoint.save.every_steps=4")
    run = of(lab, "while")
    deadline = time.monotonic() + 100
    while not ((run / "events.jsonl").exists() and events(run, "save_failed")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert record(run)["failed_save"]["error"].startswith("[Errno 28] No space left on device")
    disk.mend()
    assert attempt.wait() == 0
    assert (record(run)["state"], record(run)["failed_save"]) == ("completed", None)
    assert_same_end(run, of(lab, "reference"))


@pytest.mark.parametrize(
    ("first", "second", "codes"),
    [
        (signal.SIGTERM, (signal.SIGTERM,), {143}),
        pytest.param(signal.SIGINT, (signal.SIGINT,), {130}, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, (signal.SIGINT, signal.SIGINT), {130, 143}, marks=pytest.mark.slow),
        (signal.SIGUSR2, (signal.SIGKILL,), {-9}),
    ],
)
def test_a_second_signal_while_the_last_save_is_written(
    first: int, second: tuple[int, ...], codes: set[int], lab: Lab, disk: Disk
) -> None:
    """It saves after all, or leaves at once; either way the checkpoint before it stands, and the run ends the same."""
    variant = f"twice{first}.{second[0]}"
    attempt = lab.fork(f"run.variant={variant}")
    run = of(lab, variant)
    wait_for_rows(run, 14)
    disk.be("stuck")
    attempt.kill(first)
    disk.wait_until_stuck()
    before = set(manifests(run))
    for number in second:
        attempt.kill(number)
        time.sleep(0.1)
    if not attempt.ends_within(1):
        disk.mend()
    assert attempt.wait() in codes
    disk.mend()
    assert before <= set(manifests(run))
    lab.train(f"run.variant={variant}")
    assert_same_end(run, of(lab, "reference"))


@pytest.mark.slow
def test_saving_at_once_ends_in_the_same_bits(lab: Lab, disk: Disk) -> None:
    lab.train("run.variant=atonce", "checkpoint.storage.background=false", "train.stop_after_steps=13")
    lab.train("run.variant=atonce", "checkpoint.storage.max_mb_per_sec=50")
    assert_same_end(of(lab, "atonce"), of(lab, "reference"))
    disk.be("full")
    lab.train("run.variant=fullatonce", "checkpoint.storage.background=false", code=1)
    disk.mend()
    assert [event["step"] for event in events(of(lab, "fullatonce"), "save_failed")] == [11, 22, 33, 44]
