"""More than one host: the lines of docs/ranks.md on two that share nothing but a directory and a cable."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hosts import Host, two_hosts, why_not
from support.runs import SMOKE, Lab, assert_same_end, record, rows

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
PATIENCE = ("--rdzv-id", "job", "--rdzv-conf", "last_call_timeout=3")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    made = Lab(tmp_path, settings=(*SMOKE, "checkpoint.save.every_steps=4"))
    made.environment["PYTHONWARNINGS"] = "default"  # torch's launcher warns of itself
    return made


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    problem = why_not()
    if problem is not None:
        pytest.skip(f"two hosts on one machine: {problem}")
    with two_hosts(tmp_path) as made:
        yield made


def torchrun(host: Host, lab: Lab, nodes: str, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
    options = ("--nnodes", nodes, "--max-restarts", str(restarts), "--rdzv-endpoint", "host-a:29500", *PATIENCE)
    return host.start(
        [*TORCHRUN, *options, "-m", "dino_exp.train", *lab.command(*overrides)[3:]], lab.directory, lab.environment
    )


def ranks_in(directory: Path) -> list[int]:
    """The processes of ranks that were started in a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            is_rank = b"\0RANK=" in (path / "environ").read_bytes()
            if is_rank and (path / "cwd").readlink() == directory:
                found.append(int(path.name))
    return found


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_hosts_train_what_two_ranks_of_one_host_train(layout: str, hosts: tuple[Host, Host], lab: Lab) -> None:
    words = (f"runtime.parallel={layout}",)
    lab.train_together(2, "run.variant=one", *words)
    reference = lab.only_run()
    processes = [torchrun(host, lab, "2", "run.variant=two", *words) for host in hosts]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert sum(text.count("Attempt 1: start") for text in printed) == 1
    run = reference.with_name(reference.name.replace("one", "two"))
    assert_same_end(run, reference)
    (attempt,) = record(run)["attempts"]
    assert attempt["host"] in ("host-a", "host-b")
    lab.cli("checkpoints", "verify", str(run))


def test_a_host_that_dies_is_missed_and_the_other_goes_on_alone(hosts: tuple[Host, Host], lab: Lab) -> None:
    words = ("train.epochs=20", "runtime.timeout_secs=10")
    one, _ = [torchrun(host, lab, "1:2", *words, restarts=100) for host in hosts]
    run = lab.run_with_a_save()
    hosts[1].pull_the_cable()
    hosts[1].switch_off()
    printed, _ = one.communicate(timeout=300)
    assert one.returncode == 0, printed
    assert record(run)["state"] == "completed"
    assert [attempt["outcome"] for attempt in record(run)["attempts"]][-1] == "completed"
    assert "world_size was 2, is 1 (every step still sees the same images)" in (run / "train.log").read_text()
    assert [row["step"] for row in rows(run)] == sorted({row["step"] for row in rows(run)})


def test_hosts_that_lose_each_other_end_within_the_time_out(hosts: tuple[Host, Host], lab: Lab) -> None:
    """Also the one that cannot reach the store any more. The launchers have time-outs of their own."""
    words = ("train.epochs=200", "runtime.timeout_secs=10")
    for host in hosts:
        torchrun(host, lab, "2", *words)
    run = lab.run_with_a_save()
    assert len(ranks_in(lab.directory)) == 2
    hosts[1].pull_the_cable()
    until = time.monotonic() + 60
    while ranks_in(lab.directory):
        assert time.monotonic() < until, f"still there: {ranks_in(lab.directory)}"
        time.sleep(0.1)
    assert re.search(
        r"rank [01] \(process \d+ on host-[ab]\) ended or did not answer", record(run)["attempts"][0]["error"]
    )
    other_log = (run / "train.rank1.log").read_text()
    assert "did not answer within 10 s" in other_log or "cannot be reached" in other_log
    lab.environment["PYTHONWARNINGS"] = "error"
    lab.train("train.epochs=200", "train.stop_after_steps=4")
    assert [attempt["outcome"] for attempt in record(run)["attempts"]] == ["failed", "stopped"]
