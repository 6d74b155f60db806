"""One side of a comparison in a process of its own, which takes a step when it is told to.

Two sides in one process would share its heap, and what one of them frees the other would find.
`python -m benchmarks.sides <side> <checkout> <recipe as JSON>` reads lines from its input: `step` is answered with
seconds, `peak` with bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch

from benchmarks.measure import timed
from benchmarks.official import official_modules
from benchmarks.steps import OfficialStep, Ours, Recipe, crops_of

CORES = 2
WARM_UP = 3  # steps until the heaps have their sizes
Name = Literal["official", "ours"]


class Side:
    """The process; it starts with the weights of the official models, on the same crops as the other side."""

    def __init__(self, name: Name, checkout: Path, recipe: Recipe) -> None:
        command = [sys.executable, "-m", "benchmarks.sides", name, str(checkout), json.dumps(asdict(recipe))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> float:
        """Take a step; its seconds."""
        return self._asked("step")

    def warm_up(self) -> None:
        """Take steps that do not count."""
        for _ in range(WARM_UP):
            self.step()

    def peak(self) -> int:
        """The most bytes that it has held so far, on the device or else in the process."""
        return int(self._asked("peak"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def _asked(self, what: str) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(what, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"the process of one side has ended with {self._process.wait()}; its words are above")
        return float(answer)


def main() -> None:
    """Be one side until the input ends."""
    name, checkout, given = sys.argv[1:]
    fields = json.loads(given)
    recipe = Recipe(**{**fields, "words": tuple(fields["words"])})
    torch.set_num_threads(CORES)
    answers, sys.stdout = sys.stdout, sys.stderr  # what anybody else prints is no answer
    one = _side(name, Path(checkout), recipe)
    crops = crops_of(recipe)
    step = timed(lambda: one.step(crops), one.wait)
    for line in sys.stdin:
        if line.strip() == "peak":
            print(_peak(recipe.device), file=answers, flush=True)
            continue
        print(step(), file=answers, flush=True)


def _side(name: str, checkout: Path, recipe: Recipe) -> OfficialStep | Ours:
    official = OfficialStep(official_modules(checkout), recipe)
    if name == "official":
        return official
    ours = Ours(recipe)
    ours.load(official)
    if recipe.device == "cuda":
        del official
        torch.cuda.reset_peak_memory_stats()
    return ours


def _peak(device: str) -> int:
    """Bytes. Not `ru_maxrss`, which a process inherits from the one that started it."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
