"""Real trainings of a few milliseconds: a model of some hundred weights, two dozen images, real checkpoints and rows.

Every part of the loop that a test can put something of its own into says where the training is, so that a test can
send a signal at that very place.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.policies import AnyOf, AtEnd, KeepAny, LatestN, OnSignal
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import SaveContext
from dino_exp.data.augment_digits import DigitsAugment
from dino_exp.data.datasets import ArrayDataset
from dino_exp.data.images import Images
from dino_exp.data.loader import Batch, BatchStream
from dino_exp.dino.multicrop import MultiCropModel
from dino_exp.dino.optim import build_optimizer, ema_update_
from dino_exp.dino.schedules import Schedules
from dino_exp.evaluation.features import extract_features
from dino_exp.models.head import DINOHead
from dino_exp.models.init import materialise
from dino_exp.models.vit import VisionTransformer
from dino_exp.runs.rows import RowWriter
from dino_exp.runs.signals import SignalFlags
from dino_exp.training import step as step_module
from dino_exp.training.loop import Outcome, Training, run_training
from dino_exp.training.plan import TrainingPlan
from dino_exp.training.state import TrainState
from dino_exp.training.step import StepRule
from support.checkpoints import Died, Events, FaultyFiles, open_manager

PER_EPOCH, HORIZON, BATCH = 3, 6, 8
SCHEDULES = Schedules(
    name="cosine",
    num_epochs=HORIZON // PER_EPOCH,
    steps_per_epoch=PER_EPOCH,
    lr=0.01,
    min_lr=1e-5,
    warmup_epochs=1,
    weight_decay=0.04,
    weight_decay_end=0.4,
    teacher_momentum=0.9,
    teacher_momentum_end=1.0,
    teacher_temp=0.07,
    warmup_teacher_temp=0.04,
    warmup_teacher_temp_epochs=2,
    freeze_last_layer_epochs=1,
)
RULE = StepRule(
    seed=0,
    batch_size=BATCH,
    student_temp=0.1,
    center_momentum=0.9,
    drop_path_rate=0.2,
    depth=1,
    clip_grad=3.0,
    precision="fp32",
)
PLAN = TrainingPlan(
    steps_per_epoch=PER_EPOCH,
    horizon_steps=HORIZON,
    stop_step=HORIZON,
    log_every_steps=2,  # so that a loss may be waiting for its row
    evaluate_every_epochs=1,
    batch_size=BATCH,
    warmup_steps=PER_EPOCH,
    metric="knn_top1",
    mode="max",
    on_collapse="warn",
)
AUGMENT = DigitsAugment(
    seed=0,
    global_size=8,
    local_size=4,
    num_local_crops=2,
    global_area=(0.65, 1.0),
    local_area=(0.4, 0.8),
    ratio=(0.8, 1.25),
    max_rotation_degrees=15.0,
    blur_probability=0.2,
    max_gain=0.2,
    noise_std=0.03,
)


def images(name: str, num: int) -> ArrayDataset:
    pixels = np.random.default_rng(num).integers(0, 256, (num, 1, 8, 8), dtype=np.uint8)
    return ArrayDataset(
        name=name, version="1", num_classes=2, images_NCHW=pixels, labels_N=np.arange(num, dtype=np.int64) % 2
    )


TRAIN = images("tiny/train", PER_EPOCH * BATCH)


def build_state() -> TrainState:
    def make() -> MultiCropModel:
        backbone = VisionTransformer(image_size=8, patch_size=4, in_channels=1, embed_dim=8, depth=1, num_heads=2)
        head = DINOHead(
            in_dim=8, out_dim=16, hidden_dim=16, bottleneck_dim=8, num_layers=2, use_bn=True, norm_last_layer=True
        )
        return MultiCropModel(backbone, head)

    student = materialise(make, seed=0, scheme="fan_in")
    teacher = copy.deepcopy(student).requires_grad_(False)
    return TrainState(student, teacher, build_optimizer("adamw", student), torch.zeros(1, 16))


@dataclass(frozen=True)
class Kick:
    """A signal, at the n-th time that a place is reached."""

    place: str
    nth: int
    number: int


@dataclass
class Kicks:
    """Sends signals to this process, each at its place, and goes on when it has arrived."""

    kicks: list[Kick]
    flags: SignalFlags
    calls: dict[str, int]  # how often each place was reached

    def here(self, place: str) -> None:
        self.calls[place] = self.calls.get(place, 0) + 1
        for kick in [kick for kick in self.kicks if (kick.place, kick.nth) == (place, self.calls[place])]:
            self.kicks.remove(kick)
            arrived = self.arrival(kick.number)
            os.kill(os.getpid(), kick.number)
            until = time.monotonic() + 10
            while not arrived() and time.monotonic() < until:
                time.sleep(0.001)

    def arrival(self, number: int) -> Callable[[], bool]:
        """How to know that a signal has arrived; of a second one to stop, that it had time to."""
        if number == signal.SIGUSR1:
            return lambda: self.flags._save_wanted
        if self.flags.stop_signal is None:
            return lambda: self.flags.stop_signal is not None
        soon = time.monotonic() + 0.01
        return lambda: time.monotonic() > soon


class TellingRows(RowWriter):
    def __init__(self, path: Path, here: Callable[[str], None]) -> None:
        super().__init__(path)
        self.here = here

    def append(self, row: Any) -> None:
        self.here("before a row is written")
        super().append(row)
        self.here("after a row is written")

    @property
    def position(self) -> Any:
        if threading.current_thread() is threading.main_thread():
            self.here("a save begins")
        return super().position

    def sync(self) -> Any:
        main = threading.current_thread() is threading.main_thread()
        self.here("the very end" if main else "rows are synced")
        return super().sync()


class TellingFiles(FaultyFiles):
    """Real files without syncing. When `dead`, whoever still uses them dies."""

    def __init__(self, here: Callable[[str], None]) -> None:
        super().__init__(0, once=True)
        self.here, self.dead = here, False

    def tick(self) -> None:
        if self.dead:
            raise Died

    def create(self, path: Path) -> Any:
        if path.suffix == ".safetensors":
            self.here("a pack is written")
        return super().create(path)

    def replace(self, source: Path, target: Path) -> None:
        if target.name.startswith("step-"):
            self.here("the commit")
        if target.name.startswith(".trash"):
            self.here("retention")
        self.tick()
        self.inner.replace(source, target)


class SavedSteps(list[tuple[int, tuple[str, ...]]]):
    """What progress is told of checkpoints; of the rest nothing."""

    def advance(self, step: int, images_per_sec: float) -> None: ...

    def row(self, row: Any) -> None: ...

    def saved(self, step: int, reasons: tuple[str, ...]) -> None:
        self.append((step, reasons))


@dataclass
class QuickEvaluator:
    """Features of the training images in three batches, and a number made of them instead of the real measures."""

    clean: Callable[[Images], torch.Tensor]

    def measure(self, state: TrainState, should_stop: Callable[[], bool]) -> dict[str, float]:
        ids = np.arange(len(TRAIN)).reshape(-1, BATCH)
        batches = (self.clean(TRAIN.images(batch)) for batch in ids)
        features_ND = extract_features(state.teacher, state.teacher.features, batches, should_stop=should_stop)
        return {"knn_top1": float(features_ND.sigmoid().mean())}

    def baselines(self, state: TrainState, should_stop: Callable[[], bool]) -> dict[str, float]:
        return {f"init_{name}": value for name, value in self.measure(state, should_stop).items()}


class EverySecondStep:
    """Not an interval that may be skipped, so that the same checkpoints are saved whatever the time they take."""

    def should_save(self, context: SaveContext) -> tuple[str, ...]:
        return ("second step",) if context.step % 2 == 0 and context.step else ()


class TinyRun:
    """The folder of one run; each `train` is an attempt at it."""

    def __init__(self, folder: Path, *, beside: bool = True, workers: int = 0) -> None:
        self.folder, self.beside, self.workers = folder, beside, workers
        self.folder.mkdir()
        self.attempt = 0
        self.calls: dict[str, int] = {}
        self.events = Events()
        self.saved = SavedSteps()

    @property
    def reader(self) -> CheckpointReader:
        return CheckpointReader(self.folder / "checkpoints")

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name != "wall"} for line in lines]

    def newest(self) -> Manifest:
        return self.reader.manifest("latest")

    def train(self, *kicks: Kick) -> Outcome:
        """One attempt to its end, with signals on the way. The process that a second SIGINT ends leaves no thread."""
        self.attempt += 1
        self.saved.clear()
        self.calls.clear()
        with contextlib.ExitStack() as stack:
            flags = stack.enter_context(SignalFlags())
            here = Kicks(list(kicks), flags, self.calls).here
            files = TellingFiles(here)
            training = self.build(flags, here, files, stack)
            assert training.manager is not None
            try:
                here("before the loop")
                return run_training(training)
            except KeyboardInterrupt:
                torch.set_grad_enabled(True)  # the interrupt may have come while a context put it back
                files.dead = True
                with contextlib.suppress(Died):
                    training.manager.drain()
                raise

    def build(
        self, flags: SignalFlags, here: Callable[[str], None], files: TellingFiles, stack: contextlib.ExitStack
    ) -> Training:
        state, rows = build_state(), TellingRows(self.folder / "metrics.jsonl", here)
        manager = self.open(files)
        position = {"metrics_rows": 0, "metrics_bytes": 0}
        if manager.latest_step() is not None:
            position = dict(manager.restore(state, optional=("optimizer.",)).manifest.aside)
        rows.open_at(position["metrics_rows"], position["metrics_bytes"])
        stack.callback(rows.close)
        stream = BatchStream(TRAIN, seed=0, batch_size=BATCH, start_step=state.step, num_workers=self.workers)
        stack.enter_context(stream)
        stack.enter_context(places_in_the_step(state, manager, here))
        return Training(
            state=state,
            batches=telling_batches(stream, here),
            augment=telling(AUGMENT, here, "augmentation"),
            schedules=SCHEDULES,
            rule=RULE,
            plan=PLAN,
            evaluator=QuickEvaluator(telling(AUGMENT.clean, here, "evaluation")),
            rows=rows,
            manager=manager,
            signals=flags,
            progress=self.saved,
            record={},
            guard=lambda: None,
            on_row=lambda row, best: None,
            on_trouble=lambda failure: None,
        )

    def open(self, files: TellingFiles) -> CheckpointManager:
        return open_manager(
            self.folder / "checkpoints",
            save=AnyOf((EverySecondStep(), AtEnd(), OnSignal())),
            keep=KeepAny((LatestN(1),)),
            attempt=self.attempt,
            files=files,
            background=self.beside,
            require_finite=True,
            on_event=self.events,
        )


def telling(work: Callable[..., Any], here: Callable[[str], None], place: str) -> Callable[..., Any]:
    def told(*arguments: Any) -> Any:
        result = work(*arguments)
        here(place)
        return result

    return told


def telling_batches(stream: BatchStream, here: Callable[[str], None]) -> Iterator[Batch]:
    while True:
        here("waiting for data")
        yield next(stream)


@contextlib.contextmanager
def places_in_the_step(state: TrainState, manager: CheckpointManager, here: Callable[[str], None]) -> Iterator[None]:
    """Between the parts of forward and backward, around the update, and in the middle of the moving average."""

    def half_and_half(teacher: list[Any], student: list[Any], momentum: float, applies: Any) -> None:
        half = len(teacher) // 2
        ema_update_(teacher[:half], student[:half], momentum, applies)
        here("the moving average")
        ema_update_(teacher[half:], student[half:], momentum, applies)

    state.student.head.register_forward_pre_hook(lambda *_: here("forward"))
    state.student.backbone.cls_token.register_hook(lambda _: here("backward"))
    state.optimizer.register_step_pre_hook(lambda *_: here("the update"))
    state.optimizer.register_step_post_hook(lambda *_: here("between optimizer and teacher"))
    manager.before_update = lambda: here("before the update")  # type: ignore[method-assign]
    real, step_module.ema_update_ = step_module.ema_update_, half_and_half
    try:
        yield
    finally:
        step_module.ema_update_ = real
