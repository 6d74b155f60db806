"""SIGKILL real trainings at random moments, continue each by the same command: the same bits, the same rows."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import SMOKE, Lab, assert_same_end, record, rows

DROP_PATH = ("model.depth=2", "model.drop_path_rate=0.2", "checkpoint=rotating", "checkpoint.save.every_steps=4")
# Written as changes, and then thinned, dropped and written anew.
CHANGES = (
    "checkpoint.storage.codec=delta", "checkpoint.storage.max_chain=2", "checkpoint.keep.last=2",
    "checkpoint.keep.milestones=[25%,50%]", "checkpoint.keep.thin=teacher",
)  # fmt: skip
CASES = {
    "plain": ("checkpoint.save.every_steps=3",),
    "drop_path": DROP_PATH,
    "changes": (*DROP_PATH, *CHANGES),
    "workers": (*DROP_PATH, "runtime.workers=2", *CHANGES),
}
KILLS_A_RUN = 8
KILLS = "trainings killed with SIGKILL"
Survived = Callable[[str, int], None]


def kill_again_and_again(directory: Path, overrides: tuple[str, ...], *, num_kills: int, seed: int) -> int:
    """Kill until `num_kills` are done, over as many runs as it takes; the number of runs that ended well."""
    lab = Lab(directory, settings=(*SMOKE, *overrides))
    dice = random.Random(seed)
    done = ended = 0
    secs = lab.time("run.variant=reference")
    reference = lab.only_run()
    while done < num_kills:
        variant = f"run.variant=run{ended}"
        done += kill_one_run(lab, variant, dice, secs, most=min(KILLS_A_RUN, num_kills - done))
        run = reference.with_name(reference.name.replace("reference", f"run{ended}"))
        assert_same_end(run, reference)
        assert record(run)["state"] == "completed"
        ended += 1
    return ended


def kill_one_run(lab: Lab, variant: str, dice: random.Random, secs: float, *, most: int) -> int:
    """Kill attempts of one run at random moments, `most` times at most, then let it finish; the kills done."""
    kills = 0
    while kills < most:
        attempt = lab.fork(variant)
        if not attempt.ends_within(dice.uniform(0, secs)):
            attempt.kill()
        code = attempt.wait()
        assert code in (0, -9), attempt.output()
        if code == 0:
            return kills
        kills += 1
    lab.train(variant)
    return kills


@pytest.mark.parametrize("case", ["changes"])  # with workers: in the crash suite
def test_killed_runs_end_in_the_same_bits(case: str, tmp_path: Path, survived: Survived) -> None:
    num_kills = 3
    ended = kill_again_and_again(tmp_path, CASES[case], num_kills=num_kills, seed=0)
    assert ended >= 1
    survived(KILLS, num_kills)


@pytest.mark.crash
@pytest.mark.parametrize("case", CASES)
def test_killed_many_times(case: str, tmp_path: Path, survived: Survived) -> None:
    num_kills = 110
    ended = kill_again_and_again(tmp_path, CASES[case], num_kills=num_kills, seed=1)
    survived(KILLS, num_kills)
    survived("runs that were killed again and again and ended in the same bits", ended)


@pytest.mark.crash
def test_the_plain_command_survives_kills(lab: Lab, survived: Survived) -> None:
    """The same with the command as users type it, imports and all."""
    started = time.monotonic()
    finish(lab.start("run.variant=reference"))
    secs = time.monotonic() - started
    reference = lab.only_run()
    for share in (0.5, 0.7, 0.85):
        process = lab.start("run.variant=killed")
        time.sleep(secs * share)
        process.kill()
        process.communicate()
    finish(lab.start("run.variant=killed"))
    run = reference.with_name(reference.name.replace("reference", "killed"))
    assert_same_end(run, reference)
    assert [row["step"] for row in rows(run)] == list(range(len(rows(run))))
    survived(KILLS, 3)


def finish(process: subprocess.Popen[str]) -> None:
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
