"""What `benchmarks.storage` measures on: the states of real trainings, and what plain files of them would take."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from dino_exp.build import build_keep_policy
from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.policies import AnyOf, BestN, KeepAny, LatestN, Milestones, milestone_steps, rank_best
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.types import CheckpointInfo, Schedule
from dino_exp.checkpoint.writing import SaveRequest
from dino_exp.config.check import config_from_mapping
from dino_exp.config.checkpoint_sections import CheckpointConfig
from dino_exp.config.compose import compose
from dino_exp.dino.parts import COMPANIONS

RECIPE = (
    "model.embed_dim=128", "model.depth=4", "model.name=vit_08m", "loss.out_dim=4096",
    "checkpoint=every_epoch", "evaluation.every_epochs=1",
)  # fmt: skip


class Flat:
    """A state that is nothing but what was saved."""

    def __init__(self, flat: dict[str, Any]) -> None:
        self.flat = flat

    def state_dict(self) -> dict[str, Any]:
        return dict(self.flat)

    def load_state_dict(self, state: Any) -> None:
        for name, value in self.flat.items():
            if isinstance(value, torch.Tensor):
                value.copy_(state[name])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.flat.items() if isinstance(value, torch.Tensor)}


@dataclass(frozen=True)
class Trained:
    """The states of a training of digits, one for each epoch."""

    run: Path

    @cached_property
    def reader(self) -> CheckpointReader:
        return CheckpointReader(self.run / "checkpoints")

    @cached_property
    def infos(self) -> list[CheckpointInfo]:
        return self.reader.infos()

    @property
    def schedule(self) -> Schedule:
        return self.reader.manifest(self.infos[0].step).schedule

    def state(self, step: int) -> Flat:
        return Flat({**self.reader.load_tensors(step), **self.reader.manifest(step).state})


def train(outputs: Path, num_epochs: int) -> Trained:
    """Train, unless `outputs` has it already; a raw checkpoint after each epoch."""
    words = (*RECIPE, f"paths.outputs={outputs}", f"train.epochs={num_epochs}")
    subprocess.run([sys.executable, "-m", "dino_exp.train", *words], check=True, stdout=subprocess.DEVNULL)
    (run,) = (
        path
        for path in (outputs / "runs").iterdir()
        if CheckpointReader(path / "checkpoints").num_found() == num_epochs
    )
    return Trained(run)


def checkpoint_config(name: str) -> CheckpointConfig:
    return config_from_mapping(compose([f"checkpoint={name}"])).checkpoint


def storage_of(config: CheckpointConfig) -> Storage:
    return Storage(codec=config.storage.codec, max_chain=config.storage.max_chain, companions=COMPANIONS)


def replay(trained: Trained, folder: Path, storage: Storage, keep: KeepAny) -> Iterator[tuple[int, int]]:
    """Save the states again; after each the step, and the bytes in the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    manager = CheckpointManager(folder, save=AnyOf(()), keep=keep, storage=storage, background=False)
    for info in trained.infos:
        request = SaveRequest(step=info.step, epoch=info.epoch, schedule=trained.schedule, metrics=info.metrics)
        manager.save(trained.state(info.step), request)
        yield info.step, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def replay_policy(trained: Trained, folder: Path, name: str) -> list[float]:
    """Bytes kept after each epoch under a policy of `conf/`, over those of plain files under the same policy."""
    config = checkpoint_config(name)
    keep = build_keep_policy(config)
    file_bytes = torch_save_bytes(trained.state(trained.infos[-1].step))
    return [
        kept / (file_bytes * num_plain_files(keep, trained, step))
        for step, kept in replay(trained, folder, storage_of(config), keep)
    ]


def num_plain_files(keep: KeepAny, trained: Trained, step: int) -> int:
    """How many files people have who write the last K, the best B and each milestone under names of their own."""
    seen = [info for info in trained.infos if info.step <= step]
    num = 0
    for rule in keep.rules:
        if isinstance(rule, LatestN):
            num += min(rule.num, len(seen))
        elif isinstance(rule, BestN):
            num += min(rule.num, len(rank_best(KeepAny((rule,)), seen)))
        elif isinstance(rule, Milestones):
            num += sum(at <= step for at in milestone_steps(rule.milestones, trained.schedule))
    return num


def torch_save_bytes(state: Flat) -> int:
    file = io.BytesIO()
    torch.save(state.flat, file)
    return file.tell()


def zstd_bytes(state: Flat) -> int:
    """As tools do it: the bytes as they lie, level 3."""
    compressor = zstandard.ZstdCompressor(level=3)
    return sum(len(compressor.compress(array_of(tensor).tobytes())) for tensor in state.tensors.values())


def array_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def least_share(state: Flat, stored: Manifest) -> float:
    """What a state takes at least, of its raw size, if the lower bits of mantissas are noise.

    Signs, exponents and three bits more of a tensor count by their order-0 entropy, the rest as it is; the teacher,
    which resembles the student beside it, counts as `stored` has it, and so do tensors of other types.
    """
    least_bytes = 0.0
    for name, tensor in state.tensors.items():
        if tensor.dtype == torch.float32 and not name.startswith("teacher."):
            least_bytes += tensor.numel() * (_NOISE_BITS + _entropy_bits(_words(tensor) >> _NOISE_BITS)) / 8
        else:
            least_bytes += sum(chunk.stored_bytes for chunk in stored.tensors[name].chunks)
    return least_bytes / stored.content_bytes


def mantissa_share(state: Flat) -> float:
    """What zstd-19 makes of the lower two bytes of student and moments, of their size."""
    words = [
        _words(tensor) for name, tensor in state.tensors.items()
        if tensor.dtype == torch.float32 and tensor.numel() > 1 and not name.startswith("teacher.")
    ]  # fmt: skip
    low = np.concatenate(words).view(np.uint8).reshape(-1, 4)[:, :2]
    compressor = zstandard.ZstdCompressor(level=19)
    return sum(len(compressor.compress(low[:, at].tobytes())) for at in range(2)) / low.size


_NOISE_BITS = 20


def _words(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    return array_of(tensor).view("<u4")


def _entropy_bits(values: np.ndarray[Any, np.dtype[Any]]) -> float:
    counts = np.unique(values, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
