"""How long a step takes, from a few real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

MOST_SECS = 30.0  # for which steps are measured, the one to warm up included; the last one is finished
LEAST_SECS, LEAST_STEPS = 2.0, 5


@dataclass(frozen=True)
class Pace:
    """The mean over `num_steps` steps, loading of data included."""

    secs_per_step: float
    num_steps: int


def measure_pace(take_step: Callable[[], object], clock: Callable[[], float], *, most_steps: int, lead: int) -> Pace:
    """Take some steps, at least two and at most `most_steps`; the first warms up, `lead` more have their data already.

    Where time or steps are too few to leave these out, they are the measure. `take_step` returns when the device has
    done its part.
    """
    marks = [clock()]
    counted_from = 1 + lead  # the mark at which measuring begins
    while len(marks) <= most_steps:
        take_step()
        marks.append(clock())
        num_counted = len(marks) - 1 - counted_from
        enough = num_counted >= LEAST_STEPS and marks[-1] - marks[counted_from] >= LEAST_SECS
        if enough or (len(marks) > 2 and marks[-1] - marks[0] >= MOST_SECS):  # the first may have compiled for long
            break
    first = min(counted_from, max(len(marks) - 2, 0))
    num_steps = len(marks) - 1 - first
    return Pace((marks[-1] - marks[first]) / num_steps, num_steps)
