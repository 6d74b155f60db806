"""A host copy of the state: taken while training waits, written while it goes on.

All tensors lie in one buffer that is used again for each save, so that a save costs a copy into memory that is there
already, and one copy of the state is all the memory that it takes. On a CUDA device the buffer is page-locked and the
copy runs on a stream of its own beside the next forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64  # bytes: a cache line, and enough for every element type

Layout = tuple[tuple[str, torch.dtype, torch.Size], ...]


class HostBuffers:
    """Reused host memory for one state. What `copy` returned is valid until its next call."""

    def __init__(self) -> None:
        self._layout: Layout = ()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}
        self._device_copy: _DeviceCopy | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that are held."""
        return self._arena.numel()

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor], late: Collection[str] = ()) -> dict[str, Tensor]:
        """Copy every tensor, row-major. CPU tensors are copied when this returns.

        For tensors on a CUDA device the copy has only been ordered: `wait_on_host` waits for it. Those not in `late`
        are copied before anything that the device is asked to do from now on; those in `late` may be changed only
        after `wait_on_device`.
        """
        views = self._fit(tensors)
        on_device = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        self._device_copy = _DeviceCopy(on_device, views, late) if on_device else None
        for name, tensor in tensors.items():
            if not tensor.is_cuda:
                views[name].copy_(tensor)
        return views

    def wait_on_device(self) -> None:
        """Let the device change what was `late` only after it is copied; the host does not wait."""
        if self._device_copy is not None:
            self._device_copy.wait_on_device()

    def wait_on_host(self) -> None:
        """Return when everything is in host memory."""
        if self._device_copy is not None:
            self._device_copy.wait_on_host()

    def _fit(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views into the buffer, made anew only when names, types or shapes have changed."""
        layout = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        if layout != self._layout:
            starts, size = [], 0
            for tensor in tensors.values():
                starts.append(size)
                size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
            self._provide(size, pinned=any(tensor.is_cuda for tensor in tensors.values()))
            self._views = {
                name: self._arena[start : start + tensor.numel() * tensor.element_size()]
                .view(tensor.dtype)
                .view(tensor.shape)
                for start, (name, tensor) in zip(starts, tensors.items(), strict=True)
            }
            self._layout = layout
        return self._views

    def _provide(self, size: int, *, pinned: bool) -> None:
        if size <= self._arena.numel():
            return
        _unpin(self._arena)
        self._views, self._layout = {}, ()
        self._arena = torch.empty(0, dtype=torch.uint8)  # the old memory goes before the new comes
        self._arena = torch.empty(size, dtype=torch.uint8)
        if pinned:
            _pin(self._arena)

    def __del__(self) -> None:
        _unpin(self._arena)


class _DeviceCopy:
    """Copies from CUDA devices under way: the early ones first, on a stream of their own for each device."""

    def __init__(self, tensors: Mapping[str, Tensor], views: Mapping[str, Tensor], late: Collection[str]) -> None:
        self._done: list[tuple[torch.device, torch.cuda.Event]] = []
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            training = torch.cuda.current_stream(device)
            side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            side.wait_stream(training)
            early, later = here.keys() - set(late), here.keys() & set(late)
            with torch.cuda.stream(side):
                self._order(early, here, views)
                training.wait_event(side.record_event())
                self._order(later, here, views)
                self._done.append((device, side.record_event()))

    @staticmethod
    def _order(names: Collection[str], tensors: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> None:
        stream = torch.cuda.current_stream()
        for name in names:
            views[name].copy_(tensors[name], non_blocking=True)
            tensors[name].record_stream(stream)

    def wait_on_device(self) -> None:
        for device, done in self._done:
            torch.cuda.current_stream(device).wait_event(done)

    def wait_on_host(self) -> None:
        for _, done in self._done:
            done.synchronize()


def _pin(memory: Tensor) -> None:
    """Page-lock memory in place: torch's own pinned allocator rounds sizes up to powers of two."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister of {memory.numel()} bytes failed with error {int(code)}")


def _unpin(memory: Tensor) -> None:
    if memory.numel() and torch.cuda.is_available() and memory.is_pinned():
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        runtime.cudaHostUnregister(memory.data_ptr())
