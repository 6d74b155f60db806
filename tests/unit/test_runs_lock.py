import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest

from dino_exp.errors import LockedError, RefusedError
from dino_exp.fsio import DamagedFileError
from dino_exp.processes import process_start_ticks, this_boot_id
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import RunLock, probe
from dino_exp.runs.owner import Owner, load_owner

# Takes the lock, may fork a child that outlives it, says so, and waits for a kill or the end of its input.
HOLDER = """
import os, sys, time
from pathlib import Path
from dino_exp.processes import process_start_ticks, this_boot_id
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import RunLock
lock = RunLock.acquire(
    RunPaths(Path(sys.argv[1])), wait_secs=0, attempt=3, clock=time.time, sleep=time.sleep, say=print
)
child = 0
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(600)
print(child, flush=True)
sys.stdin.read()
lock.release()
"""
OTHER_HOST = Owner(
    host="node7",
    boot_id="b",
    pid=4711,
    process_started=1,
    token="t",
    attempt=2,
    started_at=1000.0,
    heartbeat_at=1000.0,
)


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self, now_secs=1000.0):
        self.now_secs, self.slept_secs, self.said = now_secs, 0.0, []

    def clock(self):
        return self.now_secs

    def sleep(self, secs):
        self.now_secs += secs
        self.slept_secs += secs

    def acquire(self, paths, wait_secs=0.0):
        return RunLock.acquire(
            paths, wait_secs=wait_secs, attempt=1, clock=self.clock, sleep=self.sleep, say=self.said.append
        )


def write_owner(paths, **changes):
    paths.owner.write_text(json.dumps(asdict(OTHER_HOST) | changes))


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path)


@contextlib.contextmanager
def holder(paths, mode="plain"):
    """A process that holds the lock, and the number of its forked child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(paths.directory), mode],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        if child:
            os.kill(child, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()


def test_the_owner_says_who_it_is(paths):
    with FakeTime(5.0).acquire(paths) as lock:
        assert load_owner(paths.owner) == lock.owner
        assert (lock.owner.pid, lock.owner.boot_id) == (os.getpid(), this_boot_id())
        assert lock.owner.process_started == process_start_ticks(os.getpid())
        lock.set_attempt(4)
        assert load_owner(paths.owner).attempt == 4
        lock.check()
        assert probe(paths, clock=time.time) == lock.owner
    assert not paths.owner.exists()
    assert probe(paths, clock=time.time) is None


def test_a_second_process_is_refused_and_told_who_has_it(paths):
    with holder(paths) as (process, _):
        fake = FakeTime()
        with pytest.raises(LockedError, match=rf"pid {process.pid}, since 20.*lock_wait_secs") as caught:
            fake.acquire(paths, wait_secs=90)
        assert caught.value.exit_code == 3
        assert 90 <= fake.slept_secs < 92
        assert len(fake.said) == 1
        assert str(process.pid) in fake.said[0]
        found = probe(paths, clock=time.time)
        assert (found.pid, found.attempt) == (process.pid, 3)


def test_the_lock_of_a_killed_owner_is_taken_over_at_once(paths):
    with holder(paths) as (process, _):
        process.kill()
        process.wait()
        assert load_owner(paths.owner).pid == process.pid  # it could not clean up
        assert probe(paths, clock=time.time) is None
        fake = FakeTime(time.time())
        with fake.acquire(paths) as lock:
            lock.check()
        assert fake.slept_secs == 0


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(paths):
    with holder(paths, "fork") as (process, child):
        process.kill()
        process.wait()
        os.kill(child, 0)  # alive, with the descriptor open
        fake = FakeTime(time.time())
        fake.acquire(paths).release()
        assert fake.slept_secs == 0


def test_an_owner_that_ends_lets_the_next_one_in(paths):
    with holder(paths) as (process, _):
        process.stdin.close()
        RunLock.acquire(
            paths, wait_secs=60, attempt=2, clock=time.time, sleep=time.sleep, say=lambda text: None
        ).release()
        assert process.wait(timeout=60) == 0


def test_the_same_process_cannot_have_it_twice_and_asking_does_not_drop_it(paths):
    with FakeTime().acquire(paths) as lock:
        with pytest.raises(LockedError, match=f"pid {os.getpid()}"):
            FakeTime().acquire(paths)
        probe(paths, clock=time.time)
        lock.check()
        done = subprocess.run(
            [sys.executable, "-c", HOLDER, str(paths.directory), "plain"],
            input="", capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert "LockedError" in done.stderr
    FakeTime().acquire(paths).release()


def test_a_fresh_owner_on_another_host_is_waited_for_until_it_is_stale(paths):
    write_owner(paths)
    fake = FakeTime(1030.0)
    with fake.acquire(paths, wait_secs=90) as lock:
        assert 30 <= fake.slept_secs <= 31
        assert load_owner(paths.owner).token == lock.owner.token
    assert fake.said == [
        "waiting up to 90 s for the run's owner: host node7, pid 4711, since 1970-01-01T00:16:40.000000Z"
    ]


def test_a_stale_owner_on_another_host_is_taken_over_at_once(paths):
    write_owner(paths)
    fake = FakeTime(1061.0)
    fake.acquire(paths).release()
    assert (fake.slept_secs, fake.said) == (0, [])


def test_an_owner_on_another_host_that_lives_is_not_taken_over(paths):
    write_owner(paths)
    fake = FakeTime(1000.0)

    def sleep_and_beat(secs):
        fake.sleep(secs)
        write_owner(paths, heartbeat_at=fake.now_secs)

    with pytest.raises(LockedError, match="host node7, pid 4711"):
        RunLock.acquire(paths, wait_secs=90, attempt=1, clock=fake.clock, sleep=sleep_and_beat, say=fake.said.append)
    assert probe(paths, clock=fake.clock).host == "node7"
    assert probe(paths, clock=lambda: fake.now_secs + 61) is None
    fake.now_secs += 61
    fake.acquire(paths).release()  # the refused one gave the file lock back


def test_a_silent_owner_whose_clock_runs_ahead_is_taken_over_all_the_same(paths):
    write_owner(paths, heartbeat_at=9e9)
    fake = FakeTime()
    fake.acquire(paths, wait_secs=90).release()
    assert 60 < fake.slept_secs < 62


def test_another_boot_of_this_host_counts_as_another_host(paths):
    import socket

    write_owner(paths, host=socket.gethostname())
    with pytest.raises(LockedError):
        FakeTime(1001.0).acquire(paths)


def test_an_owner_that_wakes_up_late_cannot_commit(paths):
    with FakeTime().acquire(paths) as lock:
        write_owner(paths)  # another host took over
        with pytest.raises(LockedError, match=r"lost the run.*node7.*Nothing was committed"):
            lock.check()
        paths.owner.unlink()  # and finished
        with pytest.raises(LockedError, match=r"owner\.json is gone"):
            lock.check()
        write_owner(paths)
    assert load_owner(paths.owner) == OTHER_HOST  # releasing leaves what is not ours


def test_the_heartbeat_renews_the_owner_and_stops_when_the_run_is_lost(paths, caplog):
    ticks = iter(range(2000, 10**6))
    lock = RunLock.acquire(paths, wait_secs=0, attempt=1, clock=lambda: float(next(ticks)), sleep=time.sleep, say=print)
    lock.start_heartbeat(interval_secs=0.001)
    wait_until(lambda: load_owner(paths.owner).heartbeat_at > 2010)
    lock.check()
    thread = next(t for t in threading.enumerate() if t.name == "lock-heartbeat")
    # The writer may be between its look and its write, so put the other owner there until it has noticed.
    with caplog.at_level(logging.ERROR):
        wait_until(lambda: write_owner(paths) or not thread.is_alive())
    assert "lost" in caplog.text
    lock.release()
    assert load_owner(paths.owner) == OTHER_HOST


def test_a_release_ends_the_heartbeat(paths):
    lock = FakeTime().acquire(paths)
    lock.start_heartbeat(interval_secs=0.001)
    lock.release()
    lock.release()
    assert not [t for t in threading.enumerate() if t.name == "lock-heartbeat"]
    assert not paths.owner.exists()


def wait_until(holds):
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("did not happen within 30 s")


def test_a_deleted_lock_file_gives_the_run_away_only_through_the_token(paths):
    with FakeTime().acquire(paths) as first:
        paths.lock.unlink()
        with FakeTime().acquire(paths) as second:
            second.check()
            with pytest.raises(LockedError):
                first.check()


def test_probing_creates_and_changes_nothing(paths):
    assert probe(paths, clock=time.time) is None
    assert list(paths.directory.iterdir()) == []
    FakeTime().acquire(paths).release()
    write_owner(paths)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths.directory.iterdir()}
    probe(paths, clock=time.time)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths.directory.iterdir()} == before


@pytest.mark.parametrize("text", ["", "{}", "[", '{"pid": 1e999}', "[" * 5000])
def test_a_damaged_owner_hinders_nobody_once_the_lock_is_free(paths, text, caplog):
    with holder(paths):
        paths.owner.write_text(text)
        with pytest.raises(DamagedFileError, match=r"owner\.json"):
            probe(paths, clock=time.time)
    assert probe(paths, clock=time.time) is None
    FakeTime().acquire(paths).release()
    assert "damaged owner.json" in caplog.text


def test_a_hostile_owner_cannot_break_the_message(paths):
    write_owner(paths, started_at="inf", heartbeat_at=1000.0)
    with pytest.raises(LockedError, match="an unknown time"):
        FakeTime().acquire(paths)


def test_a_link_or_folder_in_the_place_of_the_lock_is_refused(paths, tmp_path):
    paths.lock.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="cannot be opened for writing"):
        FakeTime().acquire(paths)
    assert not (tmp_path / "elsewhere").exists()
    paths.lock.unlink()
    paths.lock.mkdir()
    with pytest.raises(RefusedError, match="fork="):
        FakeTime().acquire(paths)
