"""Loading in this process and in workers: the same batches, whatever happens to the processes."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_exp.data.datasets import DataError, Indices
from dino_exp.data.digits import load_digits_split
from dino_exp.data.images import Images
from dino_exp.data.loader import Batch, BatchStream
from dino_exp.data.synthetic import SyntheticDataset
from dino_exp.errors import ConfigError

PATIENCE_SECS = 60.0


@dataclass(frozen=True)
class BrokenDataset:
    """Synthetic images of which some cannot be read."""

    broken: tuple[int, ...]
    inner: SyntheticDataset = field(
        default_factory=lambda: SyntheticDataset(split="train", num_samples=40, num_classes=4)
    )
    name: str = "broken/train"
    version: str = "1"
    channels: int = 3
    num_classes: int = 4
    size: tuple[int, int] = (32, 32)

    def __len__(self) -> int:
        return len(self.inner)

    def images(self, indices: Indices) -> Images:
        bad = sorted(set(self.broken) & set(indices.tolist()))
        if bad:
            raise OSError(f"cannot identify image file img{bad[0]}.png")
        return self.inner.images(indices)

    def labels(self, indices: Indices) -> Tensor:
        return self.inner.labels(indices)

    def fingerprint(self) -> str:
        return "sha256:broken"


def read(num_workers: int, *, start_step: int = 0, num_batches: int = 50) -> list[Batch]:
    dataset = load_digits_split("train")
    with BatchStream(dataset, seed=3, batch_size=64, start_step=start_step, num_workers=num_workers) as stream:
        return list(islice(stream, num_batches))


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.step, a.epoch) == (b.step, b.epoch)
        assert torch.equal(a.sample_ids_B, b.sample_ids_B)
        assert torch.equal(a.images.pixels_BCHW, b.images.pixels_BCHW)


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_batches_hold_the_images_they_name() -> None:
    dataset = load_digits_split("train")
    batch = read(0, num_batches=1)[0]
    assert (batch.step, batch.epoch) == (1, 0)
    assert batch.sample_ids_B.dtype == torch.int64
    assert batch.images.pixels_BCHW.dtype == torch.uint8
    assert torch.equal(batch.images.pixels_BCHW, dataset.images(batch.sample_ids_B.numpy()).pixels_BCHW)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(num_workers: int) -> None:
    assert_same(read(num_workers), read(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_start_in_mid_epoch_continues_exactly(num_workers: int) -> None:
    whole = read(0)
    for start in (1, 21, 22, 23, 37):
        assert_same(read(num_workers, start_step=start, num_batches=5), whole[start : start + 5])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_stateful_generator_is_touched(num_workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    read(num_workers, num_batches=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_named(num_workers: int) -> None:
    with BatchStream(BrokenDataset(broken=(17,)), seed=0, batch_size=8, num_workers=num_workers) as stream:
        with pytest.raises(DataError, match=r"broken/train: image 17 of step \d.*OSError: cannot identify"):
            list(islice(stream, 5))
        pids = stream.worker_pids
    assert not any(map(is_alive, pids))


def test_a_killed_worker_is_reported_at_once() -> None:
    with BatchStream(load_digits_split("train"), seed=0, batch_size=8, num_workers=2) as stream:
        next(stream)
        os.kill(stream.worker_pids[0], signal.SIGKILL)
        with pytest.raises(DataError, match=r"data worker 0 \(process \d+\) was killed by signal 9 while step"):
            list(islice(stream, 10))
        survivor = stream.worker_pids[1]
    assert not is_alive(survivor)


def test_workers_ignore_the_signals_of_their_group() -> None:
    with BatchStream(load_digits_split("train"), seed=3, batch_size=64, num_workers=2) as stream:
        first = next(stream)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            for pid in stream.worker_pids:
                os.kill(pid, number)
        assert_same([first, *islice(stream, 9)], read(0, num_batches=10))


def test_close_ends_the_workers_and_may_be_repeated() -> None:
    stream = BatchStream(load_digits_split("train"), seed=0, batch_size=8, num_workers=2)
    pids = stream.worker_pids
    assert all(map(is_alive, pids))
    stream.close()
    stream.close()
    assert not any(map(is_alive, pids))


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.workers is -1"):
        BatchStream(load_digits_split("train"), seed=0, batch_size=8, num_workers=-1)


def test_an_impossible_batch_is_refused_before_a_process_starts() -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size is 1438"):
        BatchStream(load_digits_split("train"), seed=0, batch_size=1438, num_workers=2)


TRAINER = """
import signal, sys, time
from dino_exp.data.loader import BatchStream
from dino_exp.data.synthetic import SyntheticDataset

if __name__ == "__main__":
    heard = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda n, frame: heard.append(n))
    dataset = SyntheticDataset(split="train", num_samples=64, num_classes=4)
    stream = BatchStream(dataset, seed=0, batch_size=8, num_workers=2)
    print(*stream.worker_pids, flush=True)
    mode = sys.argv[1]
    if mode == "forgets":
        next(stream)
        raise SystemExit(7)
    while len(heard) < 4:
        next(stream)
    for _ in range(20):
        next(stream)
    stream.close()
    print(sorted(set(heard)), flush=True)
"""


@pytest.fixture
def start_trainer(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)

    def start(mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "error", script, mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


def worker_pids(trainer: subprocess.Popen[str]) -> list[int]:
    assert trainer.stdout is not None
    return [int(pid) for pid in trainer.stdout.readline().split()]


def test_workers_do_not_outlive_a_killed_trainer(
    start_trainer: Callable[[str], subprocess.Popen[str]],
) -> None:
    with start_trainer("runs") as trainer:
        pids = worker_pids(trainer)
        assert len(pids) == 2
        trainer.kill()
    assert wait_until(lambda: not any(map(is_alive, pids)))


def test_only_the_trainer_answers_to_signals_of_the_group(
    start_trainer: Callable[[str], subprocess.Popen[str]],
) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    with start_trainer("runs") as trainer:
        worker_pids(trainer)
        for number in numbers:
            os.killpg(trainer.pid, number)
            time.sleep(0.1)
        out, err = trainer.communicate(timeout=PATIENCE_SECS)
    assert (trainer.returncode, err) == (0, "")
    assert out.strip() == str(sorted(int(number) for number in numbers))


def test_a_trainer_that_forgets_to_close_still_ends(
    start_trainer: Callable[[str], subprocess.Popen[str]],
) -> None:
    with start_trainer("forgets") as trainer:
        pids = worker_pids(trainer)
        _, err = trainer.communicate(timeout=PATIENCE_SECS)
    assert (trainer.returncode, err) == (7, "")
    assert wait_until(lambda: not any(map(is_alive, pids)))
