"""A launcher signals a whole process group: the training, its fork server and its loader workers. Only the training
answers, nobody is left behind, and the run ends in the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import SMOKE, Lab, assert_same_end, record

SETTINGS = (*SMOKE, "runtime.workers=2", "checkpoint=rotating", "checkpoint.save.every_steps=4")
NUM_RUNS = 4  # for each signal, once and twice


@pytest.mark.crash
@pytest.mark.timeout(3000)
def test_signals_to_the_whole_group_at_random_moments(tmp_path: Path, survived: Callable[[str, int], None]) -> None:
    lab, dice, codes = Lab(tmp_path, settings=SETTINGS), random.Random(0), []
    secs = lab.time("run.variant=reference")
    reference = lab.only_run()
    kinds = itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGUSR2), (1, 2), range(NUM_RUNS))
    for name, (number, times, _) in enumerate(kinds):
        variant = f"run.variant=run{name}"
        attempt = lab.fork(variant)
        if not attempt.ends_within(dice.uniform(0.1, 1) * secs):
            for _ in range(times):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(attempt.pid, number)
                time.sleep(dice.uniform(0, 0.05))
        codes.append(attempt.wait())
        assert codes[-1] in (0, 128 + number, -number)  # the last: before anything was begun
        assert everybody_is_gone(attempt.pid)
        lab.train(variant)
        run = reference.with_name(reference.name.replace("reference", f"run{name}"))
        assert_same_end(run, reference)
        assert record(run)["state"] == "completed"
    stopped = sum(code != 0 for code in codes)
    assert stopped > len(codes) // 2
    survived("trainings stopped by signals to their process group", stopped)


def everybody_is_gone(group: int) -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
