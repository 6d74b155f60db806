"""What checkpoints cost, against what one could write by hand. `python -m benchmarks.checkpoint`

The state is that of ViT-S/16 with K = 65,536 and AdamW. Needs 5 GB of memory and 4 GB in the folder for temporary files
(TMPDIR), which must lie on a disk: in memory there is nothing to sync. Torch uses as many threads as OMP_NUM_THREADS
says.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.checkpoint_load import seconds_to_load
from benchmarks.checkpoint_samples import (
    KEEP,
    NUM_PROTOTYPES,
    SCHEDULE,
    NamedTensors,
    checkpoint_infos,
    copy_manifest,
    save_request,
    vit_s_model,
    vit_s_state,
)
from benchmarks.measure import HEADER, Pairs, in_pairs, parser_of, seconds_of
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.registry import read_index, write_registry
from dino_exp.checkpoint.store import Store
from dino_exp.dino.optim import build_optimizer, set_hyper

NUM_ROUNDS = 7
NUM_CHECKPOINTS = 2_000
MAX_BYTES_PER_SEC = 250e6
Measured = TypeVar("Measured")


def main() -> None:
    parser_of(__doc__).parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # torch says that it saves without a process group
    with tempfile.TemporaryDirectory() as name:
        folder, state = Path(name), vit_s_state()
        print(
            f"{len(state.tensors)} tensors, {state.num_bytes / 1e6:.0f} MB, {torch.get_num_threads()} threads",
            file=sys.stderr,
        )
        print(HEADER)
        for group in (save_rows, read_rows, plan_rows, index_rows, slowdown_rows, device_rows):
            began = time.perf_counter()
            for row in group(folder, state):
                print(row, flush=True)
            print(f"{group.__name__}: {time.perf_counter() - began:.0f} s", file=sys.stderr)


def line(what: str, median: str, target: str, num: int, against: str = "–", other: str = "–", ratio: str = "–") -> str:
    return f"| {what} | {median} | {against} | {other} | {ratio} | {target} | {num} |"


def timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def in_turn(*ways: Callable[[], Measured], num: int) -> list[tuple[Measured, ...]]:
    """What each way measured, A B C A B C ..., after each went once, which makes buffers and files."""
    rounds = [[way() for way in ways] for _ in range(num + 1)][1:]
    return list(zip(*rounds, strict=True))


def open_manager(folder: Path, **options: Any) -> CheckpointManager:
    return CheckpointManager(folder, save=AnyOf(()), keep=KeepAny((LatestN(1),)), **options)


class Saves:
    """Ways to save the same state; each gives the seconds for which the caller waits, and those until it is done."""

    def __init__(self, folder: Path, state: NamedTensors) -> None:
        self._folder, self._state = folder, state
        self._saved_secs = 0.0
        self._manager = open_manager(folder / "blocked", on_event=self._hear)
        self._steps = itertools.count(1)
        self._buffers = {name: torch.empty_like(tensor) for name, tensor in state.tensors.items()}
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)  # kept: it copies into the same buffers each time

    def manager(self) -> tuple[float, float]:
        began = time.perf_counter()
        self._manager.save(self._state, save_request(next(self._steps)))
        blocked_secs = time.perf_counter() - began
        self._manager.drain()
        return blocked_secs, self._saved_secs - began

    def _hear(self, kind: str, **fields: object) -> None:
        if kind == "saved":  # durable and read back; to drop the checkpoint before it is not part of a save
            self._saved_secs = time.perf_counter()

    def copy(self) -> tuple[float, float]:
        began = time.perf_counter()
        for name, tensor in self._state.tensors.items():
            self._buffers[name].copy_(tensor)
        return (time.perf_counter() - began,) * 2

    def torch_save(self) -> tuple[float, float]:
        path, began = self._folder / "state.pt", time.perf_counter()
        torch.save(self._state.tensors, path)
        blocked_secs = time.perf_counter() - began
        for place in (path, self._folder):
            descriptor = os.open(place, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        whole_secs = time.perf_counter() - began
        path.unlink()
        return blocked_secs, whole_secs

    def async_save(self) -> tuple[float, float]:
        began = time.perf_counter()
        saving = dcp.async_save(
            dict(self._state.tensors),
            checkpoint_id=self._folder / "dcp",
            async_stager=self._stager,
            no_dist=True,
        )
        blocked_secs = time.perf_counter() - began
        saving.result()  # type: ignore[union-attr]
        return blocked_secs, time.perf_counter() - began


def save_rows(folder: Path, state: NamedTensors) -> Iterator[str]:
    saves = Saves(folder, state)
    ways = (saves.manager, saves.copy, saves.torch_save, saves.async_save)
    blocked, whole = zip(*(zip(*way, strict=True) for way in in_turn(*ways, num=NUM_ROUNDS)), strict=True)
    what = "training blocked by a save"
    yield Pairs(blocked[0], blocked[1]).line(what, "copy into existing buffers", "≤ 1.3")
    yield Pairs(blocked[0], blocked[2]).line(what, "torch.save", "≤ 0.1")
    yield Pairs(blocked[0], blocked[3]).line(what, "dcp.async_save, reused stager", "≤ 1.1")
    yield Pairs(whole[0], whole[2]).line(
        "whole save in the background, synced and read back", "torch.save + fsync", "≤ 1.3"
    )


def read_rows(folder: Path, state: NamedTensors) -> Iterator[str]:
    checkpoints, path = folder / "real", folder / "state.pt"
    manager = open_manager(checkpoints)
    manager.save(state, save_request(1))
    manager.drain()
    torch.save(state.tensors, path)

    def load(what: str) -> Callable[[], float]:
        return lambda: seconds_to_load(what, checkpoints, path)

    what = "restore, every digest checked first"
    ours, loads, copies = in_turn(load("restore"), load("load"), load("load_and_copy"), num=5)
    yield Pairs(ours, loads).line(what, "torch.load", "≤ 1.5")
    yield Pairs(ours, copies).line(what, "torch.load + copy into the live state", "–")
    path.unlink()
    reader = CheckpointReader(checkpoints)
    secs = statistics.median(timed(reader.verify) for _ in range(NUM_ROUNDS))
    speed = f"{state.num_bytes / secs / 1e9:.1f} GB/s"
    yield line("verify, from the page cache", f"{secs:.3f} s", "≥ 2 GB/s", NUM_ROUNDS, ratio=speed)


def plan_rows(folder: Path, state: NamedTensors) -> Iterator[str]:
    infos, num = checkpoint_infos(10_000), 3 * NUM_ROUNDS
    secs = statistics.median(timed(lambda: KEEP.plan(infos, SCHEDULE)) for _ in range(num))
    yield line("plan retention of 10,000 checkpoints", f"{1000 * secs:.0f} ms", "≤ 50 ms", num)


def index_rows(folder: Path, state: NamedTensors) -> Iterator[str]:
    run = folder / "run"
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    source = folder / "real" / "step-000000001.json"
    (run / "run.json").write_text("{}")
    copy_manifest(source, checkpoints, range(100, 100 * (NUM_CHECKPOINTS + 1), 100))
    store, size = Store(checkpoints), f"{len(state.tensors)} tensors"

    def rebuild() -> None:
        (checkpoints / "registry.json").unlink(missing_ok=True)
        index = read_index(store)
        assert len(index.rows) == NUM_CHECKPOINTS
        assert index.schedule is not None
        write_registry(store, index.rows.values(), index.policy, index.schedule)

    secs = statistics.median(timed(rebuild) for _ in range(3))
    yield line(f"rebuild the registry of {NUM_CHECKPOINTS:,} × {size}", f"{secs:.2f} s", "≤ 10 s", 3)
    command = [sys.executable, "-m", "dino_exp", "checkpoints", "list", str(run)]
    secs = statistics.median(seconds_of(command) for _ in range(NUM_ROUNDS))
    yield line(f"`checkpoints list` of {NUM_CHECKPOINTS:,} × {size}", f"{secs:.2f} s", "≤ 0.5 s", NUM_ROUNDS)


class Training:
    """Forward, backward and AdamW of ViT-S: what a save in the background takes time from."""

    def __init__(self, device: str, *, image_size: int, patch_size: int, num_images: int, num_prototypes: int) -> None:
        model = vit_s_model(image_size=image_size, patch_size=patch_size, channels=3, num_prototypes=num_prototypes).to(
            device
        )
        self._model, self._device = model, device
        self._images = torch.randn(num_images, 3, image_size, image_size, device=device)
        self._optimizer = build_optimizer("adamw", model)
        set_hyper(self._optimizer, lr=1e-5, weight_decay=0.0)
        self.step()
        moments = {
            f"optimizer.{name}.{moment}": value
            for name, parameter in model.named_parameters()
            for moment, value in self._optimizer.state.get(parameter, {}).items()
        }
        self.state = NamedTensors({**model.state_dict(), **moments})

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        logits, _ = self._model([self._images])
        nn.functional.log_softmax(logits, dim=-1).mean().neg().backward()
        before_update()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()
        self.wait()

    def wait(self) -> None:
        """Let the device come to an end."""
        if self._device == "cuda":
            torch.cuda.synchronize()


def slowdown_rows(folder: Path, state: NamedTensors) -> Iterator[str]:
    """Seconds of a step beside a save in flight; what the save blocks is not in it."""
    training = Training("cpu", image_size=16, patch_size=4, num_images=4, num_prototypes=1024)
    steps = itertools.count(1)
    for limit in (None, MAX_BYTES_PER_SEC):
        manager = open_manager(folder / f"slow-{limit}", max_bytes_per_sec=limit)

        def beside_save(manager: CheckpointManager = manager) -> tuple[float, int]:
            manager.save(state, save_request(next(steps)))
            began, num = time.perf_counter(), 0
            while manager.is_saving:
                training.step()
                num += 1
            manager.drain()
            return time.perf_counter() - began, num

        beside_save()
        beside, alone, save_secs = [], [], []
        for _ in range(3 if limit else 5):
            secs, num = beside_save()
            save_secs.append(secs)
            beside.append(secs / num)
            alone.append(timed(partial(training.run, num)) / num)
        how = "unlimited" if limit is None else f"max_bytes_per_sec {limit / 1e6:.0f} MB"
        what = f"a step beside a save that takes {statistics.median(save_secs):.1f} s ({how})"
        yield Pairs(tuple(beside), tuple(alone)).line(what, "a step alone", "–")


def device_rows(folder: Path, state: NamedTensors) -> Iterator[str]:
    what = "a step on the GPU, saving every 10"
    if not torch.cuda.is_available():
        yield line(what, "skipped: no CUDA device", "≤ 1.02", 0)
        return
    training = Training("cuda", image_size=224, patch_size=16, num_images=64, num_prototypes=NUM_PROTOTYPES)
    yield saving_every_10(training, folder / "device").line(what, "a step without saving", "≤ 1.02")


def saving_every_10(training: Training, folder: Path, num_steps: int = 100) -> Pairs:
    """Seconds of a step. As in training, a save that is due while another is under way is left out."""
    manager, steps = open_manager(folder), itertools.count(1)
    late = set(training.state.tensors)

    def with_saves() -> float:
        training.wait()
        began = time.perf_counter()
        for number in range(num_steps):
            if number % 10 == 0 and not manager.is_saving:
                manager.save(training.state, save_request(next(steps)), late=late)
            training.step(manager.before_update)
        training.wait()
        secs = time.perf_counter() - began
        manager.drain()
        return secs / num_steps

    def without() -> float:
        return timed(partial(training.run, num_steps)) / num_steps

    return in_pairs(with_saves, without, num_pairs=NUM_ROUNDS)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
