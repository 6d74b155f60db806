"""Timing in pairs, so that a machine whose speed drifts changes both sides alike."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a benchmark: `--help` says what its file begins with."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


@dataclass(frozen=True)
class Pairs:
    """Seconds of A and B, measured in turn."""

    a_secs: tuple[float, ...]
    b_secs: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of A/B, pair by pair."""
        return statistics.median(a / b for a, b in zip(self.a_secs, self.b_secs, strict=True))

    def line(self, a: str, b: str, target: str) -> str:
        a_secs, b_secs = statistics.median(self.a_secs), statistics.median(self.b_secs)
        return f"| {a} | {a_secs:.3f} s | {b} | {b_secs:.3f} s | {self.ratio:.3f} | {target} | {len(self.a_secs)} |"


HEADER = "| what | median | against | median | ratio | target | pairs |\n|---|---|---|---|---|---|---|"


def in_pairs(a: Callable[[], float], b: Callable[[], float], *, num_pairs: int) -> Pairs:
    """Warm both up once, then measure A B A B ...; each callable returns its own seconds."""
    a(), b()
    measured = [(a(), b()) for _ in range(num_pairs)]
    return Pairs(tuple(m[0] for m in measured), tuple(m[1] for m in measured))


def timed(step: Callable[[], object], wait: Callable[[], None]) -> Callable[[], float]:
    """What takes the step and gives its seconds; `wait` until a device has done all of it."""

    def once() -> float:
        wait()
        started = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - started

    return once


def seconds_of(command: Sequence[str], **kwargs: object) -> float:
    """Wall-clock seconds of a whole process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)  # type: ignore[call-overload]
    return time.perf_counter() - started
