"""What several processes cost, and what each of them writes. `python -m benchmarks.ranks`

Two processes with one thread each against one with two threads, on the same two cores and the same global batch: what
is lost is the cost of being several. Then a save of the state of ViT-S/16 with K = 65,536 by 1, 2 and 4 processes: the
share of the bytes that each writes, and how long each is blocked.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint_samples import KEEP, save_request, vit_s_state
from benchmarks.measure import parser_of
from dino_exp import build
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.sharding.member import Member
from dino_exp.checkpoint.sharding.team import Leader
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.dist.place import place_of
from dino_exp.dist.ranks import ONE_RANK, ManyRanks, Ranks, joined
from dino_exp.training.step import train_step

NUM_PAIRS = 5
NUM_CORES = 2
CPU = torch.device("cpu")
CASES = {
    "ViT-nano, digits": ("experiment=digits", 40),
    "ViT-S, digits": ("experiment=digits model=vit_s train.batch_size=32", 3),
    "ViT-S, 96 px": (
        "experiment=digits model=vit_s data=synthetic augment=dino loss=digits data.image_size=96 data.local_size=32 "
        "data.patch_size=16 train.batch_size=16 train.epochs=45",
        3,
    ),
}
NUM_SAVES = 5


def main() -> None:
    """Print both tables."""
    parser_of(__doc__).parse_args()
    print("| images per second, two processes over one, the same batch | ddp | fsdp | target | pairs |")
    print("|---|---|---|---|---|")
    for name, (words, num_steps) in CASES.items():
        ratios = [_throughput(words, num_steps, parallel) for parallel in ("ddp", "fsdp")]
        print(f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} | ≥ 0.85 (ddp) | {NUM_PAIRS} |", flush=True)
    print()
    print("| a save of 701 MB by | share of the bytes of a process, least to most, times their number | blocked |")
    print("|---|---|---|")
    for size in (1, 2, 4):
        print(_save_line(size), flush=True)


def _throughput(words: str, num_steps: int, parallel: str) -> float:
    """Median over pairs of images per second of two processes over those of one."""
    ratios = []
    for _ in range(NUM_PAIRS):
        two = _run(2, "train", [parallel, str(num_steps), *words.split()])
        one = _run(1, "train", [parallel, str(num_steps), *words.split()])
        ratios.append(max(one) / max(two))  # the slowest process decides
    return statistics.median(ratios)


def _save_line(size: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        blocked = _run(size, "save", [folder])
        manifest = CheckpointReader(folder).manifest("latest")
        contents = [pack.bytes - pack.header_bytes for pack in manifest.packs]
    shares = [content / sum(contents) * size for content in contents]
    return (
        f"| {size} {'process' if size == 1 else 'processes'} | {min(shares):.2f} to {max(shares):.2f} | "
        f"{max(blocked) * 1000:.0f} ms |"
    )


def _run(size: int, work: str, arguments: Sequence[str]) -> list[float]:
    """What each of so many processes measures, in seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ranks", work, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), printed
    return [float(json.loads(text.splitlines()[-1])) for text in printed]


def train(ranks: Ranks, parallel: str, num_steps: int, words: Sequence[str]) -> float:
    """Seconds of some steps, after two to warm up."""
    place = ranks.place
    torch.set_num_threads(NUM_CORES // place.size)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    config = config_from_mapping(compose([*words, f"runtime.parallel={parallel}"]))
    data = build.build_data(config.data)
    plan = build.build_plan(config, len(data.train))
    state = build.build_state(config, data.train.channels, CPU)
    spread = build.spread(config, state, ranks)
    schedules, augment = build.build_schedules(config, plan.steps_per_epoch), build.build_augment(config)
    rule = build.build_rule(config)
    started = 0.0
    with build.build_batches(config, data.train, 0, place) as batches:
        for step in range(num_steps + 2):
            if step == 2:
                ranks.stack(torch.zeros(1))
                started = time.perf_counter()
            train_step(state, next(batches), augment=augment, schedules=schedules, rule=rule, parallel=spread)
    return time.perf_counter() - started


def save(ranks: Ranks, folder: str) -> float:
    """Seconds for which this process is blocked by a save, once its buffers are there: the median."""
    torch.set_num_threads(1)
    state: Any = vit_s_state()
    policy, keep, blocked = AnyOf(()), KEEP, []
    keeper: Any
    if isinstance(ranks, ManyRanks):
        side = ranks.connect()
        if ranks.place.is_first:
            keeper = CheckpointManager(folder, save=policy, keep=keep, writers=Leader(ranks.council, side))
        else:
            keeper = Member(folder, ranks.council, side, save=policy, attempt=1)
    else:
        keeper = CheckpointManager(folder, save=policy, keep=keep)
    for step in range(1, NUM_SAVES + 1):
        ranks.stack(torch.zeros(1))
        started = time.perf_counter()
        keeper.save(state, save_request(step))
        blocked.append(time.perf_counter() - started)
        keeper.drain()
    return statistics.median(blocked[1:])


def in_a_rank(work: str, arguments: Sequence[str]) -> None:
    """One of the processes that `_run` starts."""

    def measure(ranks: Ranks) -> float:
        if work == "save":
            return save(ranks, arguments[0])
        parallel, num_steps, *words = arguments
        return train(ranks, parallel, int(num_steps), words)

    place = place_of(os.environ)
    if place.size == 1:
        print(json.dumps(measure(ONE_RANK)))
        return
    with joined(place, CPU, 600) as ranks:
        print(json.dumps(measure(ranks)))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        in_a_rank(sys.argv[1], sys.argv[2:])
    else:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        main()
