"""How steps are measured: a clock and steps of known length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path

import pytest

from dino_exp.runs.memory import available_bytes
from dino_exp.training.pace import Pace, measure_pace


class Clock:
    """Steps of these lengths, and after them of the last one."""

    def __init__(self, lengths: Sequence[float]) -> None:
        self.now, self.taken, self._lengths = 0.0, 0, chain(lengths, repeat(lengths[-1]))

    def step(self) -> None:
        self.now += next(self._lengths)
        self.taken += 1

    def read(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("lengths", "most_steps", "lead", "expected", "taken"),
    [
        pytest.param([9.0, 0.5], 100, 0, Pace(0.5, 5), 6, id="the first one warms up"),
        pytest.param([1.0, 0.125], 100, 0, Pace(0.125, 16), 17, id="quick ones for two seconds"),
        pytest.param([1.0, 0.0, 0.0, 0.5], 100, 2, Pace(0.5, 5), 8, id="what was loaded ahead does not count"),
        pytest.param([4.0, 12.0], 100, 0, Pace(12.0, 3), 4, id="slow ones for half a minute"),
        pytest.param([40.0, 7.0], 100, 4, Pace(7.0, 1), 2, id="two are the least"),
        pytest.param([4.0, 1.0], 3, 0, Pace(1.0, 2), 3, id="no more than there are"),
        pytest.param([4.0, 1.0], 3, 8, Pace(1.0, 1), 3, id="fewer than were loaded ahead"),
        pytest.param([4.0], 1, 0, Pace(4.0, 1), 1, id="a single one"),
    ],
)
def test_the_pace(lengths: list[float], most_steps: int, lead: int, expected: Pace, taken: int) -> None:
    clock = Clock(lengths)
    assert measure_pace(clock.step, clock.read, most_steps=most_steps, lead=lead) == expected
    assert clock.taken == taken


def test_available_memory_is_the_least_of_system_and_groups(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    10 kB\n")
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    groups = tmp_path / "fs"
    (groups / "a" / "b").mkdir(parents=True)

    def available() -> int | None:
        return available_bytes(tmp_path / "meminfo", tmp_path / "cgroup", groups)

    assert available() == 10240
    (groups / "a" / "b" / "memory.max").write_text("max\n")
    (groups / "a" / "memory.max").write_text("9000\n")
    (groups / "a" / "memory.current").write_text("5000\n")
    (groups / "a" / "memory.stat").write_text("anon 7\ninactive_file 1000\n")
    assert available() == 5000
    assert available_bytes(tmp_path / "none", tmp_path / "none", groups) is None
    assert available_bytes() is not None
