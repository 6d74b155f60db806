"""Reports and analysis: how long, how fast, in how much memory, and what a live report costs a training.

`python -m benchmarks.report [folder]`: about ten minutes; what is in the folder from an earlier time is used again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoint_samples import NamedTensors, save_request, vit_s_state
from benchmarks.measure import in_pairs, parser_of, seconds_of
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf, BestN, EverySteps, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.storage import Storage

NUM_ROUNDS = 3
NUM_CHECKPOINTS = 2_000
NUM_LARGE = 6
ALL = KeepAny((LatestN(10**6), BestN("knn_top1")))
TOOL = [sys.executable, "-m", "dino_exp"]
_PEAK = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        print("| what | median | aim | rounds |\n|---|---|---|---|")
        for rows in (digits_rows, many_rows, large_rows, live_rows):
            for row in rows(folder):
                print(row, flush=True)


def line(what: str, found: str, aim: str, rounds: int) -> str:
    return f"| {what} | {found} | {aim} | {rounds} |"


def digits_rows(folder: Path) -> Iterator[str]:
    run = trained(folder / "digits", "train.epochs=100")
    for what, options in (("the whole page", ()), ("without the model, as while training", ("--no-model",))):
        command = [*TOOL, "checkpoints", "report", str(run), "--to", str(folder / "page.html"), *options]
        secs = statistics.median(seconds_of(command) for _ in range(NUM_ROUNDS))
        aim = "≤ 5 s" if not options else "–"
        yield line(f"report of 100 epochs of digits, {what}", f"{secs:.2f} s", aim, NUM_ROUNDS)


def trained(outputs: Path, *overrides: str) -> Path:
    """The run of these settings, trained unless it is there."""
    words = (*overrides, f"paths.outputs={outputs}")
    subprocess.run([sys.executable, "-m", "dino_exp.train", *words], check=True, stdout=subprocess.DEVNULL)
    (run,) = (outputs / "runs").iterdir()
    return run


def many_rows(folder: Path) -> Iterator[str]:
    """A run with thousands of checkpoints: that of the digits, of which the newest state is saved again and again."""
    source, run = trained(folder / "digits", "train.epochs=100"), folder / "many"
    if not run.is_dir():
        making = folder / "making"
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(source, making, ignore=shutil.ignore_patterns("checkpoints"))
        manager = open_manager(making / "checkpoints", Storage(codec="zstd"))
        state = NamedTensors(CheckpointReader(source / "checkpoints").load_tensors("latest"))
        for step in range(1, NUM_CHECKPOINTS + 1):
            manager.save(state, save_request(step))
            manager.drain()
        making.rename(run)
    command = [*TOOL, "checkpoints", "report", str(run), "--to", str(folder / "page.html")]
    secs = statistics.median(seconds_of(command) for _ in range(NUM_ROUNDS))
    yield line(f"report of {NUM_CHECKPOINTS:,} checkpoints", f"{secs:.2f} s", "≤ 20 s", NUM_ROUNDS)


def open_manager(checkpoints: Path, storage: Storage) -> CheckpointManager:
    return CheckpointManager(checkpoints, save=AnyOf((EverySteps(1),)), keep=ALL, storage=storage, background=False)


def large_rows(folder: Path) -> Iterator[str]:
    """ViT-S/16 with K = 65,536, raw: analysis against reading the same files, and its memory."""
    run, state = folder / "large", vit_s_state()
    largest = max(tensor.nbytes for tensor in state.tensors.values())
    if not run.is_dir():
        making = folder / "making-large"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        manager = open_manager(making / "checkpoints", Storage())
        for step in range(1, NUM_LARGE + 1):
            for tensor in state.tensors.values():
                tensor.mul_(1.001)
            manager.save(state, save_request(step))
            manager.drain()
        making.rename(run)
    del state
    shutil.copy(next((folder / "digits" / "runs").glob("*/run.json")), run / "run.json")
    packs = sorted((run / "checkpoints" / "packs").iterdir())
    num_bytes = sum(pack.stat().st_size for pack in packs)
    command = [*TOOL, "checkpoints", "evolution", str(run), "--json"]

    def analysis() -> float:
        forget(packs)
        return seconds_of(command)

    def reading() -> float:
        forget(packs)
        return seconds_of(["cat", *map(str, packs)])

    pairs = in_pairs(analysis, reading, num_pairs=NUM_ROUNDS)
    speeds = [num_bytes / statistics.median(secs) / 1e6 for secs in (pairs.a_secs, pairs.b_secs)]
    told = f"{speeds[0]:,.0f} MB/s, {1 / pairs.ratio:.2f} of `cat` ({speeds[1]:,.0f} MB/s)"
    yield line(f"evolution of {NUM_LARGE} × {num_bytes / NUM_LARGE / 1e6:.0f} MB, start-up and all", told, "≥ 0.5", 3)
    peak = int(subprocess.check_output([sys.executable, "-c", _PEAK, *command])) << 10
    aim = 2 * largest + 300e6
    yield line("its memory at most", f"{peak / 1e6:.0f} MB", f"≤ {aim / 1e6:.0f} MB", 1)


def forget(files: list[Path]) -> None:
    """Drop the files from the system's cache, so that they are read from the disk."""
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def live_rows(folder: Path) -> Iterator[str]:
    """A training of digits with and without a live report: all of it, and how long the loop itself was held up."""
    blocked: list[float] = []

    def training(report: bool) -> float:
        outputs = Path(tempfile.mkdtemp(dir=folder))
        started = time.perf_counter()
        run = trained(outputs, "train.epochs=20", "evaluation.every_epochs=2", f"logger.report={str(report).lower()}")
        ended = time.perf_counter()
        if report:
            events = [json.loads(text) for text in (run / "events.jsonl").read_text().splitlines()]
            blocked.extend(event["blocked_secs"] / (ended - started) for event in events if event["kind"] == "reported")
        rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(outputs)
        return sum(row["wall"]["seconds"] for row in rows)

    pairs = in_pairs(lambda: training(True), lambda: training(False), num_pairs=NUM_ROUNDS)
    yield line("steps of a training with a live report, over one without", f"{pairs.ratio:.3f}", "–", NUM_ROUNDS)
    share = statistics.median(blocked)
    yield line("share of the time in which it blocks the loop", f"{100 * share:.3f} %", "≤ 1 %", len(blocked))


if __name__ == "__main__":
    main()
