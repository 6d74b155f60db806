"""A step on a CUDA device: the host runs ahead, half precision, compiled layers, batches that come by themselves.

Written on a machine without a CUDA device, and run on none so far: kept plain for that reason. Run it with
`pytest -m gpu tests/unit/test_training_gpu.py`.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dino_exp import build
from dino_exp.attempts.numerics import apply_numerics
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.config.schema import Config
from dino_exp.data.loader import Batch
from dino_exp.data.prefetch import OnDevice
from dino_exp.training.state import TrainState
from dino_exp.training.step import train_step
from dino_exp.training.verdict import NonFiniteError, settle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]
WORDS = (
    "experiment=digits", "model=vit_t", "data=synthetic", "augment=dino", "loss=digits", "data.image_size=64",
    "data.local_size=32", "train.batch_size=16", "runtime.device=cuda", "model.depth=3",
)  # fmt: skip


class Training:
    """The parts of a training, without a run around it."""

    def __init__(self, *words: str, read_every: int | None = None) -> None:
        self.config: Config = config_from_mapping(compose([*WORDS, *words]))
        self.device, _ = apply_numerics(self.config.runtime, {})
        self.data = build.build_data(self.config.data).train
        self.state: TrainState = build.build_state(self.config, 3, self.device)
        build.prepare_layers(self.config.runtime, self.state)
        self.rule = build.build_rule(self.config, read_every=read_every or build.read_every(self.state))
        self.schedules = build.build_schedules(self.config, 100)
        self.augment = build.build_augment(self.config)

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        with build.build_batches(self.config, self.data, self.state.step) as stream:
            yield build.build_prefetch(stream, self.device)

    def step(self, batch: Batch) -> None:
        train_step(self.state, batch, augment=self.augment, schedules=self.schedules, rule=self.rule)

    def run(self, num_steps: int) -> TrainState:
        with self.batches() as batches:
            for batch in itertools.islice(batches, num_steps):
                self.step(batch)
        settle(self.state)
        return self.state


@contextmanager
def no_waiting() -> Iterator[None]:
    """In here it is an error if the host waits for the device."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_device(precision: str) -> None:
    training = Training(f"train.precision={precision}")
    assert training.rule.read_every > 10
    with training.batches() as batches:
        for _ in range(3):  # caches fill, the first moments are made
            training.step(next(batches))
        settle(training.state)
        with no_waiting():
            for _ in range(5):
                training.step(next(batches))
    settle(training.state)
    assert training.state.step == 8


@pytest.mark.parametrize("words", [(), ("train.precision=bf16",), ("train.precision=fp16",), ("runtime.compile=true",)])
def test_two_trainings_end_in_the_same_bits(words: tuple[str, ...]) -> None:
    one, two = (Training(*words).run(6).state_dict() for _ in range(2))
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


def test_a_host_that_runs_ahead_trains_what_one_that_waits_trains() -> None:
    ahead, waiting = Training().run(12), Training(read_every=1).run(12)
    assert ahead.loss_sum == pytest.approx(waiting.loss_sum, rel=1e-4)


def test_what_is_not_finite_changes_nothing_however_late_it_is_seen() -> None:
    training, straight = Training(), Training().run(4)
    with training.batches() as batches:
        for batch in itertools.islice(batches, 9):
            factor = math.nan if batch.step == 5 else 1.0
            handle = training.state.student.backbone.cls_token.register_hook(lambda grad, factor=factor: grad * factor)
            training.step(batch)
            handle.remove()
    with pytest.raises(NonFiniteError, match="step 5"):
        settle(training.state)
    assert training.state.step == 4
    expected = straight.state_dict()
    for name, value in training.state.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "word", ["train.precision=bf16", "train.precision=fp16", "runtime.compile=true", "runtime.tf32=true"]
)
def test_every_mode_learns_alike(word: str) -> None:
    assert Training(word).run(10).loss_sum == pytest.approx(Training().run(10).loss_sum, rel=0.02)


def test_batches_come_to_the_device_in_order_and_errors_in_their_turn() -> None:
    training = Training()
    with build.build_batches(training.config, training.data, 0) as plain:
        expected = list(itertools.islice(plain, 4))

    def failing() -> Iterator[Batch]:
        yield from expected
        raise OSError("the disk is gone")

    found = OnDevice(failing(), training.device)
    for batch in expected:
        here = next(found)
        assert here.images.device.type == "cuda"
        assert torch.equal(here.images.pixels_BCHW.cpu(), batch.images.pixels_BCHW)
        assert np.array_equal(here.images.sizes_B2, batch.images.sizes_B2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)
