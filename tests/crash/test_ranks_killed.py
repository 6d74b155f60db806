"""Faults of one rank while several train: killed, stopped, failing; the others end with one error, and all go on."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.runs import SMOKE, Lab, assert_same_end, ranks_of, without_agent, zygote
from support.tiny_training import HORIZON
from support.zygote import Crew

from dino_exp.checkpoint.reader import CheckpointReader

KILLS = "ranks killed with SIGKILL while others trained on"
Survived = Callable[[str, int], None]


class Tiny:
    """One run of the tiny training by several ranks; each `start` is an attempt."""

    def __init__(self, folder: Path, size: int, parallel: str = "ddp") -> None:
        self.lab, self.folder, self.size, self.parallel = Lab(folder.parent), folder, size, parallel
        folder.mkdir()
        self.attempt = 0

    def start(
        self, *, timeout_secs: float = 20, trouble: str = "", size: int | None = None, agent: bool = True
    ) -> Crew:
        self.attempt += 1
        arguments = (str(self.folder), str(self.attempt), self.parallel, str(timeout_secs), trouble)
        environments = ranks_of(size or self.size, self.lab.environment)
        environments = environments if agent else without_agent(environments)
        call = "support.rank_checks:train_tiny"
        return zygote(self.lab.environment).start_crew(arguments, self.folder, environments, call)

    def finish(self) -> None:
        crew = self.start()
        assert crew.wait() == [0] * self.size, told(crew)

    def end(self) -> tuple[Any, ...]:
        """What every attempt must come to: the state, and the rows."""
        reader = CheckpointReader(self.folder / "checkpoints")
        assert reader.verify()["ok"]
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [{name: value for name, value in json.loads(line).items() if name != "wall"} for line in lines]
        manifest = reader.manifest("latest")
        return manifest.step, reader.state_digest("latest"), rows


def told(crew: Crew) -> str:
    return "\n---\n".join(crew.output(rank) for rank in range(len(crew.pids)))


def wait_for(crew: Crew, word: str, rank: int = 0, secs: float = 30) -> None:
    until = time.monotonic() + secs
    while word not in crew.output(rank):
        assert time.monotonic() < until, told(crew)
        time.sleep(0.005)


def kill_ranks(folder: Path, *, num_kills: int, size: int, parallel: str, seed: int) -> int:
    """Kill one rank at a random moment, again and again, over as many runs as it takes; the number of runs."""
    dice = random.Random(seed)
    reference = Tiny(folder / "reference", size, parallel)
    reference.finish()
    started = time.monotonic()
    Tiny(folder / "timed", size, parallel).finish()
    secs = time.monotonic() - started
    num_done = num_runs = 0
    while num_done < num_kills:
        run = Tiny(folder / f"run{num_runs}", size, parallel)
        for _ in range(6):
            crew, rank = run.start(), dice.randrange(size)
            if not crew.end_within(dice.uniform(0.3 * secs, secs)):
                crew.kill(rank=rank)
            codes = crew.wait()
            assert codes[rank] in (0, -9), told(crew)
            assert all(code in (0, 1) for at, code in enumerate(codes) if at != rank), f"{codes}\n{told(crew)}"
            if codes[rank] == 0:
                break
            num_done += 1
        run.finish()
        assert run.end() == reference.end()
        num_runs += 1
    return num_runs


def test_ranks_killed_at_random_moments(tmp_path: Path, survived: Survived) -> None:
    kill_ranks(tmp_path, num_kills=20, size=2, parallel="ddp", seed=0)
    survived(KILLS, 20)


@pytest.mark.crash
@pytest.mark.parametrize(("size", "parallel"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")])
def test_ranks_killed_many_times(size: int, parallel: str, tmp_path: Path, survived: Survived) -> None:
    kill_ranks(tmp_path, num_kills=60, size=size, parallel=parallel, seed=1)
    survived(KILLS, 60)


def test_a_killed_rank_is_named_by_the_others_at_once(tmp_path: Path) -> None:
    run = Tiny(tmp_path / "run", 3)
    crew = run.start(timeout_secs=60)
    wait_for(crew, "BEGUN", rank=1)
    started = time.monotonic()
    crew.kill(rank=1)
    codes = crew.wait()
    assert time.monotonic() - started < 20, "long before the time-out"
    assert codes == [1, -9, 1], told(crew)
    errors = [crew.output(rank).partition("ERROR ")[2].partition(";")[0] for rank in (0, 2)]
    assert errors[0] == errors[1], told(crew)
    assert f"rank 1 (process {crew.pids[1]}" in errors[0]


def test_a_rank_that_hangs_is_named_within_the_time_out(tmp_path: Path) -> None:
    run = Tiny(tmp_path / "run", 2)
    crew = run.start(timeout_secs=2)
    wait_for(crew, "BEGUN", rank=1)
    crew.kill(signal.SIGSTOP, rank=1)
    wait_for(crew, "ERROR", secs=15)
    assert "rank 1" in crew.output(0).partition("ERROR")[2], told(crew)
    crew.kill(signal.SIGCONT, rank=1)
    assert crew.wait() == [1, 1], told(crew)
    run.finish()
    assert run.end()[0] == HORIZON


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.crash), "fsdp"])
def test_images_that_one_rank_cannot_load_end_all_with_one_error_and_a_save(parallel: str, tmp_path: Path) -> None:
    reference, run = Tiny(tmp_path / "reference", 2, parallel), Tiny(tmp_path / "run", 2, parallel)
    reference.finish()
    crew = run.start(trouble="data 1 6")
    assert crew.wait() == [1, 1], told(crew)
    errors = [crew.output(rank).partition("ERROR ")[2].strip() for rank in (0, 1)]
    assert errors == ["rank 1: image 3 could not be loaded", "image 3 could not be loaded"]
    assert CheckpointReader(run.folder / "checkpoints").manifest("latest").step == 5, "nothing was lost"
    run.finish()
    assert run.end() == reference.end()


IN_CRASH = [pytest.param(0, True, marks=pytest.mark.crash), pytest.param(1, False, marks=pytest.mark.crash)]


@pytest.mark.parametrize(("rank", "agent"), [(1, True), (0, False), *IN_CRASH])
def test_a_rank_that_fails_within_a_step_ends_all_with_its_error(rank: int, agent: bool, tmp_path: Path) -> None:
    reference, run = Tiny(tmp_path / "reference", 2), Tiny(tmp_path / "run", 2)
    reference.finish()
    crew = run.start(trouble=f"forward {rank} 6", timeout_secs=8, agent=agent)
    assert crew.wait() == [1, 1], told(crew)
    for at in (0, 1):
        assert "out of memory" in crew.output(at), told(crew)
        assert "nothing was saved at step 5; the last checkpoint is that of step 4" in crew.output(at), told(crew)
    run.finish()
    assert run.end() == reference.end()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.crash), 1])
def test_a_signal_to_one_rank_stops_all_at_one_step_with_one_save(rank: int, tmp_path: Path) -> None:
    reference, run = Tiny(tmp_path / "reference", 2), Tiny(tmp_path / "run", 2)
    reference.finish()
    crew = run.start()
    wait_for(crew, "BEGUN", rank=rank)
    crew.kill(signal.SIGTERM, rank=rank)
    codes = crew.wait()
    ends = {crew.output(at).partition("ENDED ")[2].strip() for at in (0, 1)}
    assert codes in ([143, 143], [0, 0]), told(crew)  # or it came too late
    assert len(ends) == 1, told(crew)
    step = int(ends.pop().split()[1])
    assert CheckpointReader(run.folder / "checkpoints").manifest("latest").step == step
    run.finish()
    assert run.end() == reference.end()


def test_other_numbers_of_ranks_go_on_from_where_the_first_were(tmp_path: Path) -> None:
    run = Tiny(tmp_path / "run", 3, "fsdp")
    crew = run.start()
    wait_for(crew, "BEGUN")
    crew.kill(signal.SIGTERM)
    assert set(crew.wait()) <= {143, 0}
    crew = run.start(size=2)
    assert crew.wait() == [0, 0], told(crew)
    assert run.end()[0] == HORIZON


@pytest.mark.crash
def test_the_real_command_by_ranks_survives_kills(tmp_path: Path, survived: Survived) -> None:
    """The command itself, continued by the same command, as a launcher restarts it."""
    lab = Lab(tmp_path, settings=(*SMOKE, "checkpoint.save.every_steps=4", "runtime.timeout_secs=30"))
    dice = random.Random(3)
    started = time.monotonic()
    lab.train_together(2, "run.variant=reference")
    secs = time.monotonic() - started
    reference = lab.only_run()
    num_done = num_runs = 0
    while num_done < 40:
        variant = f"run.variant=run{num_runs}"
        for _ in range(8):
            crew, rank = lab.launch(2, variant), dice.randrange(2)
            if not crew.end_within(dice.uniform(0.1, secs)):
                crew.kill(rank=rank)
            codes = crew.wait()
            assert codes[rank] in (0, -9), told(crew)
            if codes[rank] == 0:
                break
            num_done += 1
        lab.train_together(2, variant)
        run = reference.with_name(reference.name.replace("reference", f"run{num_runs}"))
        assert_same_end(run, reference)
        num_runs += 1
    survived(KILLS, num_done)
