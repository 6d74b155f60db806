"""Batches that are on their way to a CUDA device before they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from dino_exp.data.images import to_device
from dino_exp.data.loader import Batch


class OnDevice(Iterator[Batch]):
    """The batches of another iterator, one ahead, copied on a stream of its own while the device computes.

    An error of the other iterator is raised when it is the turn of the batch that failed, not one batch early.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ahead: tuple[Batch, torch.cuda.Event] | Exception | None = None

    def __next__(self) -> Batch:
        """The next batch; work that is queued from now on waits for its copy, and the host does not."""
        ready = self._begin() if self._ahead is None else self._ahead
        if isinstance(ready, Exception):
            raise ready
        batch, copied = ready
        now = torch.cuda.current_stream(self._device)
        now.wait_event(copied)
        batch.images.pixels_BCHW.record_stream(now)  # its memory is free once this stream has done with it
        self._ahead = self._begin()
        return batch

    def _begin(self) -> tuple[Batch, torch.cuda.Event] | Exception:
        try:
            batch = next(self._batches)
        except Exception as error:  # noqa: BLE001 (raised in its turn)
            return error
        with torch.cuda.stream(self._stream):
            pixels = to_device(batch.images.pixels_BCHW, self._device)
            copied = self._stream.record_event()
        return replace(batch, images=replace(batch.images, pixels_BCHW=pixels)), copied
