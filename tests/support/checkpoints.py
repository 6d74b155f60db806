"""A tiny state, requests, and file layers that fail, die, or lose what was not synced."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.policies import (
    AnyOf,
    BestN,
    EverySteps,
    KeepAny,
    LatestN,
    Milestones,
    ThinMilestones,
    milestone_from_text,
)
from dino_exp.checkpoint.storage import Storage
from dino_exp.checkpoint.types import Schedule
from dino_exp.checkpoint.writing import SaveRequest
from dino_exp.fsio import Files

SCHEDULE = Schedule(horizon_steps=8, steps_per_epoch=2)
KEEP = KeepAny((LatestN(2), BestN("knn_top1"), Milestones((milestone_from_text("25%"),))))
SAVE = AnyOf((EverySteps(1),))
THIN_TO_TEACHER = ThinMilestones(("teacher.",))


class ToyState:
    """A few small tensors of several types and some JSON, all a function of the step."""

    def __init__(self, step: int = 0) -> None:
        self.tensors = {
            "student.weight": torch.full((2, 3), float(step)),
            "student.half": torch.tensor([step, 0.5], dtype=torch.bfloat16),
            "optimizer.count": torch.tensor(step),
            "loss.empty": torch.empty(0, 2),
        }
        self.values: dict[str, Any] = {"loader.position": step, "best": {"step": step, "value": None}}

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, **self.values}

    def load_state_dict(self, state: Any) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
        for name in self.values:
            self.values[name] = state[name]

    def is_of_step(self, step: int) -> bool:
        other = type(self)(step)
        same = all(torch.equal(self.tensors[name], other.tensors[name]) for name in self.tensors)
        return same and self.values == other.values


class Named:
    """A state that is nothing but tensors, which it takes back as they are."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tensors)

    def load_state_dict(self, state: Any) -> None:
        self.tensors = {name: state[name] for name in self.tensors}


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


class CodedState(ToyState):
    """The same, with tensors for which the codecs pay: some that move a little, one that never does."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(step)
        noise = torch.randn(4, 80, generator=torch.Generator().manual_seed(1))
        self.tensors |= {
            "student.moving": noise + 1e-4 * step,
            "teacher.moving": noise + 0.8e-4 * step,
            "student.still": noise[:2] * 3,
            "optimizer.moving.exp_avg_sq": noise.square() * (1.0 - 1e-3 * step),
        }


@dataclass(frozen=True)
class Kind:
    """A way of storing and keeping, and the state that shows it."""

    storage: Storage
    make: type[ToyState]
    keep: KeepAny = KEEP

    def open_manager(self, folder: Path, **options: Any) -> CheckpointManager:
        return open_manager(folder, **{"storage": self.storage, "keep": self.keep} | options)

    def save_steps(self, folder: Path, steps: Any, **options: Any) -> CheckpointManager:
        manager = self.open_manager(folder, **options)
        for step in steps:
            manager.save(self.make(step), request(step))
            manager.drain()
        return manager


COMPANIONS = {"teacher.": "student."}
DELTA = Storage(codec="delta", max_chain=2, companions=COMPANIONS)
THINNING = KeepAny((LatestN(1), Milestones((milestone_from_text("1"), milestone_from_text("25%"))), THIN_TO_TEACHER))
KINDS = {
    "raw": Kind(Storage(), ToyState),
    "zstd": Kind(Storage(codec="zstd", companions=COMPANIONS), CodedState),
    "delta": Kind(DELTA, CodedState),
    "thinned": Kind(DELTA, CodedState, THINNING),
}


def request(step: int, **fields: Any) -> SaveRequest:
    given = {"metrics": {"knn_top1": 0.1 * (step % 3)}, "reasons": ("every 1 steps",)} | fields
    record = {"config_hash": "c1:" + "0" * 64, "git_commit": "f" * 40, "code_id": "e" * 64}
    return SaveRequest(step=step, epoch=step // 2, **{"schedule": SCHEDULE, "record": record} | given)


def open_manager(folder: Path, **options: Any) -> CheckpointManager:
    """A manager that saves at once; `background=True` for one that saves beside."""
    given = {"save": SAVE, "keep": KEEP, "clock": lambda: 1.7e9, "background": False}
    return CheckpointManager(folder, **given | options)


def save_steps(folder: Path, steps: Any, **options: Any) -> CheckpointManager:
    manager = open_manager(folder, **options)
    for step in steps:
        manager.save(ToyState(step), request(step))
        manager.drain()
    return manager


def saved_manifest(folder: Path, step: int, **options: Any) -> Manifest:
    """The manifest of a toy state of `step`, saved into `folder`."""
    manager = open_manager(folder, **options)
    manager.save(ToyState(step), request(step))
    manifest = manager.drain()
    assert manifest is not None
    return manifest


class Events(list[tuple[str, dict[str, Any]]]):
    def __call__(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self if name == kind]


def pack_of(folder: Path, step: int) -> Path:
    return next((folder / "packs").glob(f"step-{step:09d}.*"))


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


class Died(BaseException):
    """The process is dead: nothing may catch this."""


class FaultyFiles:
    """Passes operations on to real files, until number `fail_at`: from then on it dies, or raises once."""

    def __init__(self, fail_at: int, error: Callable[[], BaseException] = Died, once: bool = False) -> None:
        self.fail_at, self.error, self.once, self.num_calls = fail_at, error, once, 0
        self.inner = Files()

    def tick(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.fail_at or (self.num_calls > self.fail_at and not self.once):
            raise self.error()

    def create(self, path: Path) -> FaultyHandle:
        self.tick()
        return FaultyHandle(self, self.inner.create(path))

    def sync_dir(self, path: Path) -> None:
        self.tick()  # not passed on: no test can see the difference, and it is slow

    def mkdir(self, path: Path) -> None:
        self.tick()
        path.mkdir(exist_ok=True)

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.tick()
            return getattr(self.inner, name)(*arguments)

        return call


class FaultyHandle:
    def __init__(self, files: FaultyFiles, inner: Any) -> None:
        self.files, self.inner = files, inner

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        try:
            self.files.tick()
        except BaseException:
            self.inner.write(view[: len(view) // 2])  # a fault in the middle of a write leaves half of it
            raise
        self.inner.write(view)

    def write_at(self, offset: int, data: Any) -> None:
        self.files.tick()
        self.inner.write_at(offset, data)

    def sync(self) -> None:
        self.files.tick()

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> FaultyHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GatedFiles(FaultyFiles):
    """Real files that wait before they create a pack until `gate` is set."""

    def __init__(self) -> None:
        super().__init__(0, once=True)
        self.gate, self.reached = threading.Event(), threading.Event()

    def create(self, path: Path) -> Any:
        if path.suffix == ".safetensors":
            self.reached.set()
            assert self.gate.wait(60)
        return super().create(path)


def quick_files() -> FaultyFiles:
    """Real files without faults and without syncing folders and files: for tests that cut no power."""
    return FaultyFiles(0, once=True)


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


class Inode:
    def __init__(self) -> None:
        self.now = bytearray()
        self.durable = b""


class PowerLossFiles:
    """Real files, and beside them an account of what would be on the disk if the power failed now.

    A file's bytes are durable after `sync` of its handle; names in a folder after `sync_dir` of it. Changes of names
    that were not synced may have reached the disk or not, each by itself (reordering): `surviving` draws which.
    """

    def __init__(self, root: Path, die_at: int, error_at: int = 0) -> None:
        self.inner, self.root, self.num_calls = Files(), root, 0
        self.die_at, self.error_at = die_at, error_at
        self.inodes: dict[Path, Inode] = {}
        self.names: dict[Path, Inode] = {}  # durable names of files
        self.folders = {root}
        self.pending: list[tuple[Path, Callable[[dict[Path, Inode]], None]]] = []

    def tick(self) -> None:
        self.num_calls += 1
        if self.num_calls >= self.die_at:
            raise Died
        if self.num_calls == self.error_at:
            raise io_error()

    def mkdir(self, path: Path) -> None:
        self.tick()
        path.mkdir(exist_ok=True)
        self.folders.add(path)

    def create(self, path: Path) -> LossyHandle:
        self.tick()
        handle = self.inner.create(path)
        inode = self.inodes[path] = Inode()
        self.pending.append((path.parent, lambda names: names.__setitem__(path, inode)))
        return LossyHandle(self, handle, inode)

    def replace(self, source: Path, target: Path) -> None:
        self.tick()
        self.inner.replace(source, target)
        inode = self.inodes[target] = self.inodes.pop(source)

        def rename(names: dict[Path, Inode]) -> None:
            names.pop(source, None)
            names[target] = inode

        self.pending.append((target.parent, rename))

    def unlink(self, path: Path) -> None:
        self.tick()
        self.inner.unlink(path)
        self.inodes.pop(path)
        self.pending.append((path.parent, lambda names: names.pop(path, None)))

    def sync_dir(self, path: Path) -> None:
        self.tick()
        for folder, change in self.pending:
            if folder == path:
                change(self.names)
        self.pending = [item for item in self.pending if item[0] != path]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # reading changes nothing

    def surviving(self, target: Path, choice: random.Random | bool) -> None:
        """Write what a disk would hold after a power loss now: all, none or some of the pending changes of names."""
        names = dict(self.names)
        for _, change in self.pending:
            if choice is True or (isinstance(choice, random.Random) and choice.random() < 0.5):
                change(names)
        for folder in sorted(self.folders):
            (target / folder.relative_to(self.root)).mkdir(exist_ok=True, parents=True)
        for path, inode in names.items():
            data = inode.durable
            if isinstance(choice, random.Random) and len(inode.now) > len(data):
                data += bytes(inode.now[len(data) : choice.randint(len(data), len(inode.now))])
            (target / path.relative_to(self.root)).write_bytes(data)


class LossyHandle:
    def __init__(self, files: PowerLossFiles, inner: Any, inode: Inode) -> None:
        self.files, self.inner, self.inode = files, inner, inode

    def write(self, data: Any) -> None:
        self.files.tick()
        self.inner.write(data)
        self.inode.now += memoryview(data).cast("B")

    def write_at(self, offset: int, data: Any) -> None:
        self.files.tick()
        self.inner.write_at(offset, data)
        view = memoryview(data).cast("B")
        self.inode.now[offset : offset + len(view)] = view

    def sync(self) -> None:
        self.files.tick()
        self.inode.durable = bytes(self.inode.now)

    def close(self) -> None:
        self.inner.close()

    def __enter__(self) -> LossyHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
