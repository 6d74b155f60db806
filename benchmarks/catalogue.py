"""Questions to 10,000 runs with 200,000 checkpoints. `python -m benchmarks.catalogue [folder [num_runs]]`

The runs are made in `folder` (a temporary one by default; on a memory disk it takes two minutes, on another the record
of each run is synced), and removed again.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.catalogue_samples import make_runs
from benchmarks.measure import parser_of, seconds_of
from dino_exp.catalogue.catalogue import Catalogue

NUM_RUNS, NUM_CHECKPOINTS, REPEATS, NUM_REBUILDS = 10_000, 20, 7, 3


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("num_runs", nargs="?", type=int, default=NUM_RUNS)
    asked = parser.parse_args()
    home, num_runs = asked.folder, asked.num_runs
    with tempfile.TemporaryDirectory(dir=home) as folder:
        outputs = Path(folder)
        make_runs(outputs, num_runs=num_runs, num_checkpoints=NUM_CHECKPOINTS)
        print(f"{num_runs:,} runs, {num_runs * NUM_CHECKPOINTS:,} checkpoints in {home or 'a temporary folder'}")
        print("| what | median | target | repeats |\n|---|---|---|---|")
        rebuild = [sys.executable, "-m", "dino_exp", "runs", "rebuild", "--outputs", folder, "--json"]
        per_sec = statistics.median(num_runs / seconds_of(rebuild) for _ in range(NUM_REBUILDS))
        print(f"| runs rebuild | {per_sec:,.0f} runs/s | ≥ 1,000 | {NUM_REBUILDS} |", flush=True)
        size = (outputs / "catalogue.sqlite").stat().st_size
        print(f"| the file | {size / 1e6:.0f} MB | | |")
        for what, words in (
            ("runs list", ["list"]),
            (
                "runs list --where optimizer.lr=3e-3 --state completed",
                ["list", "--where", "optimizer.lr=3e-3", "--state", "completed"],
            ),
            ("runs list --json (all of them)", ["list", "--json"]),
            ("runs best", ["best"]),
            ("runs best --metric val_loss --commit 0…1", ["best", "--metric", "val_loss", "--commit", f"{1:040x}"]),
            ("runs best --group", ["best", "--group"]),
            ("dino-exp --version, for comparison", []),
        ):
            command = [
                sys.executable,
                "-m",
                "dino_exp",
                *(["runs", *words, "--outputs", folder] if words else ["--version"]),
            ]
            target = "≤ 0.5 s" if words in (["list"], ["best"]) else ""
            print(f"| {what} | {median(lambda c=command: seconds_of(c)):.3f} s | {target} | {REPEATS} |", flush=True)
        runs = sorted((outputs / "runs").iterdir())[:REPEATS]
        catalogue, updates = Catalogue(outputs), iter(runs * 2)

        def update() -> float:
            run = next(updates)
            began = time.perf_counter()
            catalogue.update(run)
            return time.perf_counter() - began

        print(f"| note a run of {NUM_CHECKPOINTS} checkpoints | {1000 * median(update):.1f} ms | ≤ 5 ms | {REPEATS} |")


def median(measure: Callable[[], float]) -> float:
    """Of several, after one to warm up."""
    measure()
    return statistics.median(measure() for _ in range(REPEATS))


if __name__ == "__main__":
    main()
