"""Batches of raw images, loaded here or by worker processes, in an order that depends on the step alone.

A worker answers requests for steps over a pipe of its own. Nothing else is shared: no queue with a lock that
a killed process could take to its grave, no file in /dev/shm; and the end of either side is seen by the other
at once, because the pipe closes. torch's DataLoader under forkserver does not do that: its workers outlive a
killed trainer, since they watch the fork server, which they themselves keep alive.

Shapes: B images of a batch, C channels, H x W pixels.
"""

from __future__ import annotations

import atexit
import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from dino_exp.data.datasets import Dataset, Indices
from dino_exp.data.images import Images, Sizes
from dino_exp.data.order import batch_indices, epoch_of
from dino_exp.data.processes import ignore_signals, signals_held_back
from dino_exp.dist.place import ALONE, Place, share
from dino_exp.errors import ConfigError, DataError

_AHEAD = 2  # requests a worker holds: the one it works on, and the next, so that it need not wait
_JOIN_SECS = 5.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The raw images of one optimizer step, or a rank's share of them."""

    step: int
    epoch: int
    sample_ids_B: Tensor  # int64: their numbers in the data set
    images: Images

    def part(self, number: int, num_parts: int) -> Batch:
        """One of so many consecutive parts, which differ by at most one image."""
        if num_parts == 1:
            return self
        places = share(len(self.sample_ids_B), number, num_parts)
        return self.at(slice(places.start, places.stop))

    def at(self, places: slice) -> Batch:
        """Some of its images."""
        return replace(self, sample_ids_B=self.sample_ids_B[places], images=self.images.at(places))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be loaded for any step: all that a worker needs to know."""

    dataset: Dataset
    seed: int
    batch_size: int
    place: Place

    def indices(self, step: int) -> Indices:
        ours = self.place.share_of(self.batch_size)
        return batch_indices(self.seed, step, self.batch_size, len(self.dataset))[ours.start : ours.stop]

    def images(self, step: int) -> Images:
        """The images of `step`. Raises DataError that names the image which cannot be loaded."""
        indices = self.indices(step)
        try:
            return self.dataset.images(indices)
        except Exception as error:
            sample, cause = self._culprit(indices, error)
            if isinstance(cause, DataError):  # it names the file, and says what to do
                raise DataError(f"data set {self.dataset.name}: image {sample} of step {step}: {cause}") from error
            raise DataError(
                f"data set {self.dataset.name}: image {sample} of step {step} could not be loaded "
                f"({type(cause).__name__}: {cause}); repair or remove it, then run the same command again"
            ) from error

    def _culprit(self, indices: Indices, error: Exception) -> tuple[str, Exception]:
        for index in indices:
            try:
                self.dataset.images(np.array([index]))
            except Exception as cause:  # noqa: BLE001 - handed back to the caller, who raises it with its name
                return str(index), cause
        return "(none alone)", error


class BatchStream(Iterator[Batch]):
    """The batches of steps `start_step + 1`, `start_step + 2`, ... without end: to resume, pass the step.

    `batch_size` images make up a step; each rank loads its share of them.
    With `num_workers` > 0 that many processes, all started here, load the images ahead. Call `close`, or use
    it as a context, when done. Raises DataError when an image cannot be loaded or a worker has died.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        start_step: int = 0,
        num_workers: int = 0,
        place: Place = ALONE,
    ) -> None:
        if num_workers < 0:
            raise ConfigError(f"runtime.workers is {num_workers}; expected 0 or more: try runtime.workers=0")
        epoch_of(1, len(dataset), batch_size)  # refuses an impossible batch size before a process is started
        self._plan = _Plan(dataset=dataset, seed=seed, batch_size=batch_size, place=place)
        self._step = start_step
        self._shape = (len(place.share_of(batch_size)), dataset.channels, *dataset.size)
        self._workers: list[_Worker] = []
        if num_workers:
            # Workers ignore SIGTERM, with which the interpreter would end them if the owner forgot to.
            atexit.register(self.close)
            try:
                self._start(num_workers)
            except BaseException:
                self.close()
                raise

    def _start(self, num_workers: int) -> None:
        with signals_held_back([__name__]):
            for number in range(num_workers):
                self._workers.append(_Worker(number, self._plan))
        for step in range(self._step + 1, self._step + 1 + num_workers * _AHEAD):
            self._worker_of(step).request(step)

    def _worker_of(self, step: int) -> _Worker:
        return self._workers[step % len(self._workers)]

    @property
    def step(self) -> int:
        """The step of the batch that was handed out last: where another stream would have to start."""
        return self._step

    @property
    def worker_pids(self) -> list[int]:
        """The process numbers of the workers."""
        return [worker.pid for worker in self._workers]

    def __next__(self) -> Batch:
        """The batch of the next step."""
        step = self._step + 1
        images = self._receive(step) if self._workers else self._plan.images(step)
        self._step = step
        return Batch(
            step=step,
            epoch=epoch_of(step, len(self._plan.dataset), self._plan.batch_size),
            sample_ids_B=torch.from_numpy(self._plan.indices(step)),
            images=images,
        )

    def _receive(self, step: int) -> Images:
        worker = self._worker_of(step)
        images = worker.receive(step, torch.empty(self._shape, dtype=torch.uint8))
        worker.request(step + len(self._workers) * _AHEAD)
        return images

    def close(self) -> None:
        """End the workers; may be called twice, and after an error."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.end()
        atexit.unregister(self.close)

    def __enter__(self) -> BatchStream:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self.close()


class _Worker:
    """The trainer's end of one worker process."""

    def __init__(self, number: int, plan: _Plan) -> None:
        self._number = number
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        self._process: ForkServerProcess = context.Process(
            target=_serve, args=(plan, theirs), name=f"data-{number}", daemon=True
        )
        self._process.start()
        theirs.close()  # or the death of the worker would not close the pipe

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def request(self, step: int) -> None:
        # A dead worker is reported where its answer is missed, with all that is known.
        with suppress(OSError):
            self._pipe.send(step)

    def receive(self, step: int, into_BCHW: Tensor) -> Images:
        try:
            answer: Sizes | str = self._pipe.recv()
            if not isinstance(answer, str):
                self._pipe.recv_bytes_into(into_BCHW.view(-1).numpy().data)
        except (EOFError, OSError) as error:
            raise self._death(step) from error
        if isinstance(answer, str):
            raise DataError(answer)
        return Images(into_BCHW, answer)

    def _death(self, step: int) -> DataError:
        self._process.join(_JOIN_SECS)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        return DataError(
            f"data worker {self._number} (process {self.pid}) {how} while step {step} waited for its images; "
            "when memory is short, lower runtime.workers; the same command continues from the last checkpoint"
        )

    def hang_up(self) -> None:
        self._pipe.close()

    def end(self) -> None:
        self._process.join(_JOIN_SECS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(plan: _Plan, pipe: Connection) -> None:
    """The life of a worker: answer requests until the trainer hangs up or dies."""
    ignore_signals()
    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        while True:
            step: int = pipe.recv()
            try:
                images = plan.images(step)
            except DataError as error:
                pipe.send(str(error))
                continue
            pipe.send(images.sizes_B2)
            pipe.send_bytes(images.pixels_BCHW.reshape(-1).numpy().data)
