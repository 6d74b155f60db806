"""Records where the time of a few steps goes: a trace for a viewer, and a table for people (`runtime.profile`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dino_exp.fsio import make_dirs, write_atomic
from dino_exp.training.loop import Progress
from dino_exp.training.phases import PHASES

log = logging.getLogger(__name__)

WARM_UP_STEPS = 3  # the first steps allocate, choose kernels and fill queues
NUM_STEPS = 5
NUM_OPERATORS = 25


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was written: the steps in it and where it lies."""

    first_step: int
    last_step: int
    table: Path
    trace: Path


class ProfiledProgress:
    """Passes on what it hears of the training, and profiles a few of its steps: no number becomes another.

    After `WARM_UP_STEPS` of the steps from `start_step` to `stop_step`, or earlier where these are few. Use it as a
    context: where training stops before it is through, it writes what it has, and after an error nothing. `guard`
    raises when this process does not own the run any more. `on_written` hears of the files; a disk that does not take
    them is told aloud.
    """

    def __init__(
        self,
        inner: Progress,
        folder: Path,
        *,
        attempt: int,
        start_step: int,
        stop_step: int,
        device: torch.device,
        guard: Callable[[], None],
        on_written: Callable[[Profile], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        num_left = max(stop_step - start_step, 0)
        self._inner, self._folder, self._attempt, self._device = inner, folder, attempt, device
        self._begin_after = start_step + min(WARM_UP_STEPS, max(num_left - NUM_STEPS, 0))
        self._step, self._guard, self._on_written, self._clock = start_step, guard, on_written, clock
        self._recording: profile | None = None
        self._began_secs = 0.0

    def __enter__(self) -> ProfiledProgress:
        if self._step == self._begin_after:
            self._begin()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._recording is not None and error is None:
            self._end()
        elif self._recording is not None:
            self._recording.stop()

    def advance(self, step: int, images_per_sec: float) -> None:
        """A step is done."""
        self._inner.advance(step, images_per_sec)
        self._step = step
        if self._recording is None and step == self._begin_after:
            self._begin()
        elif self._recording is not None and step == self._begin_after + NUM_STEPS:
            self._end()

    def row(self, row: Mapping[str, Any]) -> None:
        """A metrics row was written."""
        self._inner.row(row)

    def saved(self, step: int, reasons: tuple[str, ...]) -> None:
        """A checkpoint was committed."""
        self._inner.saved(step, reasons)

    def _begin(self) -> None:
        # Read at the first use of torch's recorder, which otherwise writes lines of its own to the error stream.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._recording = profile(activities=activities)
        self._synchronise()
        self._recording.start()
        self._began_secs = self._clock()

    def _end(self) -> None:
        assert self._recording is not None
        self._synchronise()
        secs, recorded, self._recording = self._clock() - self._began_secs, self._recording, None
        recorded.stop()
        num_steps = self._step - self._begin_after
        if num_steps == 0:
            return
        self._guard()
        name = f"attempt-{self._attempt:03d}"
        written = Profile(
            first_step=self._begin_after + 1,
            last_step=self._step,
            table=self._folder / f"{name}.txt",
            trace=self._folder / f"{name}.trace.json.gz",
        )
        head = f"Steps {written.first_step} to {written.last_step} on {self._device}, the profiler's own cost included"
        try:
            make_dirs(self._folder)
            text = profile_text(head, recorded, num_steps, secs, on_cuda=self._device.type == "cuda")
            write_atomic(
                written.table, f"{text}\nEvery call, on a line of time: {written.trace.name} (ui.perfetto.dev)\n"
            )
            recorded.export_chrome_trace(str(written.trace))
        except OSError as problem:
            log.warning("the profile could not be written (%s); training goes on", problem)
            return
        self._on_written(written)

    def _synchronise(self) -> None:
        """So that what the device still has to do counts for the steps that asked for it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def profile_text(head: str, recorded: profile, num_steps: int, secs: float, *, on_cuda: bool) -> str:
    """The time of an average step by phase, and the operators that took most of it (`on_cuda`: of the device)."""
    phases = _phase_secs(recorded)
    total_ms = 1e3 * secs / num_steps
    lines: list[tuple[str, float]] = [(name, 1e3 * phases[name] / num_steps) for name in PHASES if name in phases]
    lines += [("everything else", total_ms - sum(ms for _, ms in lines))]
    shown = [(name, f"{ms:.2f}", f"{100 * ms / total_ms:.1f}%") for name, ms in [*lines, ("a step", total_ms)]]
    text = [head, "", *_columns(("phase", "ms a step", "share"), shown), ""]
    text += ["The operators that took most time themselves", ""]
    text += _columns(
        ("operator", "ms a step", "share", "calls a step"), list(_operators(recorded, num_steps, total_ms, on_cuda))
    )
    return "\n".join(text) + "\n"


def _phase_secs(recorded: profile) -> dict[str, float]:
    """Seconds of the host by phase, over all steps."""
    found: dict[str, float] = {}
    events: Any = recorded.events()  # type: ignore[no-untyped-call]
    for event in events:
        if event.name in PHASES and _is_host(event):
            found[event.name] = found.get(event.name, 0.0) + event.cpu_time_total / 1e6
    return found


def _operators(recorded: profile, num_steps: int, total_ms: float, on_cuda: bool) -> Iterator[tuple[str, ...]]:
    averages: Any = recorded.key_averages()
    rows = [
        (one.self_device_time_total if on_cuda else one.self_cpu_time_total, one.key, one.count)
        for one in averages
        if one.key not in PHASES and _is_host(one)  # a kernel counts with who launched it
    ]
    for micros, name, count in sorted(rows, reverse=True)[:NUM_OPERATORS]:
        ms = micros / 1e3 / num_steps
        yield name[:60], f"{ms:.2f}", f"{100 * ms / total_ms:.1f}%", f"{count / num_steps:.0f}"


def _is_host(event: Any) -> bool:
    return bool(event.device_type.name == "CPU")


def _columns(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned: the first column to the left, numbers to the right."""
    widths = [max(map(len, cells)) for cells in zip(names, *rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (names, *rows)
    ]
