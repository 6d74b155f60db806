"""`CheckpointAnalyzer`: one run and its checkpoints, to be looked at. Nothing is changed, also while it is in use."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dino_exp.analysis.comparison import Comparison, compare_checkpoints
from dino_exp.analysis.evolution import Moment, walk
from dino_exp.analysis.history import History, read_history
from dino_exp.analysis.timeline import Timeline, make_timeline
from dino_exp.checkpoint.policies import BestN
from dino_exp.checkpoint.reader import CheckpointReader, Listing
from dino_exp.checkpoint.store import Store
from dino_exp.errors import DinoExpError, UsageError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.layout import RunPaths
from dino_exp.runs.lock import probe
from dino_exp.runs.record import RunRecord, load_record, shown_state
from dino_exp.runs.rows import last_step

Progress = Callable[[int], None]
DEFAULT_METRIC = "knn_top1"


@dataclass(frozen=True)
class CheckpointAnalyzer:
    """The run in a directory. What it has read once it keeps: make another one to look again."""

    directory: Path

    @property
    def paths(self) -> RunPaths:
        """Where its files lie."""
        return RunPaths(self.directory)

    @property
    def quoted(self) -> str:
        """Its directory, for a command that can be typed as it stands."""
        return shlex.quote(str(self.directory))

    @property
    def reader(self) -> CheckpointReader:
        """Its checkpoints. Raises CorruptCheckpointError for a folder that leads elsewhere."""
        return CheckpointReader(self.paths.checkpoints)

    @cached_property
    def record(self) -> RunRecord:
        """What `run.json` says. Raises UsageError where there is none, DamagedFileError."""
        found = load_record(self.paths.run_json)
        if found is None:
            raise UsageError(f"{self.paths.run_json}: there is no run; `dino-exp runs list` shows those that are")
        return found

    @cached_property
    def state(self) -> str:
        """The run's state, as it is to be shown: `interrupted` where nobody holds the lock of a running one."""
        held = True
        with contextlib.suppress(DinoExpError):
            held = probe(self.paths, clock=time.time) is not None
        return shown_state(self.record, held)

    @cached_property
    def listing(self) -> Listing:
        """Its checkpoints, as `checkpoints list` shows them. Raises CorruptCheckpointError for bad pins."""
        return self.reader.listing()

    @cached_property
    def history(self) -> History:
        """Its metrics."""
        return read_history(self.paths.metrics)

    @property
    def metric(self) -> str:
        """What the run is judged by."""
        ranked = [rule.metric for rule in self.listing.policy.rules if isinstance(rule, BestN)]
        return ranked[0] if ranked else DEFAULT_METRIC

    def evolution(
        self,
        steps: Sequence[int] | None = None,
        weights: Sequence[str] | None = None,
        progress: Progress = lambda _: None,
    ) -> Iterator[Moment]:
        """How the weights have moved over some or all checkpoints, one after the other (`analysis.evolution.walk`)."""
        store = Store(self.paths.checkpoints)
        return walk(store, self.reader.steps() if steps is None else steps, weights, progress)

    def compare(
        self,
        at: str | int | Path,
        other: CheckpointAnalyzer,
        other_at: str | int | Path,
        progress: Progress = lambda _: None,
    ) -> Comparison:
        """One of its checkpoints (A) with one of another run, or of itself (B).

        Raises NoCheckpointError, UsageError, CorruptCheckpointError, OSError.
        """
        return compare_checkpoints(
            (Store(self.paths.checkpoints), self.reader.resolve(at)),
            (Store(other.paths.checkpoints), other.reader.resolve(other_at)),
            progress,
        )

    def timeline(self) -> Timeline:
        """What happened to the run. Raises OSError."""
        events: list[dict[str, Any]] = []
        problem = None
        try:
            events.extend(read_lines(self.paths.events))
        except DamagedFileError as damage:
            problem = str(damage)
        rows_end = last_step(self.paths.metrics)
        return make_timeline(self.record, self.state, events, self.listing, last_row=rows_end, problem=problem)
