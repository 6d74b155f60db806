"""A host copy of the state: taken while training waits, written while it goes on.

All tensors lie in one buffer that is used again for each save, so that a save costs a copy into memory that is there
already, and one copy of the state is all the memory that it takes. On a CUDA device the buffer is page-locked and the
copy runs on a stream of its own beside the next forward and backward pass. Where memory cannot be locked (a limit of
the system, a sandbox) the host waits for the copy instead.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Hashable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_ALIGN = 64  # bytes: a cache line, and enough for every element type
_PAGE = 4096  # bytes
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device

K = TypeVar("K", bound=Hashable)  # what tells one tensor from another


class HostBuffers(Generic[K]):
    """Reused host memory for one state. What `copy` returned is valid until its next call."""

    def __init__(self) -> None:
        self._layout: tuple[tuple[K, torch.dtype, torch.Size], ...] = ()
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._views: dict[K, Tensor] = {}
        self._device_copies = _DeviceCopies()
        self._may_pin = True
        self._unpin: weakref.finalize[..., HostBuffers[K]] | None = None  # at the latest when this object goes

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that are held."""
        return self._arena.numel()

    @torch.no_grad()
    def copy(self, tensors: Mapping[K, Tensor], late: Collection[K] = ()) -> dict[K, Tensor]:
        """Copy every tensor, row-major. CPU tensors are copied when this returns.

        For tensors on a CUDA device the copy has only been ordered: `wait_on_host` waits for it. Those not in `late`
        are copied before anything that the device is asked to do from now on (in the stream that is current); those in
        `late` may be changed only after `wait_on_device`.
        """
        self.wait_on_host()  # of an earlier copy, whose save was given up: it would still write into this memory
        views = self._fit(tensors)
        self._device_copies.order({name: tensor for name, tensor in tensors.items() if tensor.is_cuda}, views, late)
        for name, tensor in tensors.items():
            if not tensor.is_cuda:
                views[name].copy_(tensor)
        return views

    def wait_on_device(self) -> None:
        """Let the device change what was `late` only after it is copied; the host does not wait."""
        self._device_copies.wait_on_device()

    def wait_on_host(self) -> None:
        """Return when everything is in host memory."""
        self._device_copies.wait_on_host()

    def _fit(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Views into the buffer, made anew only when names, types or shapes have changed."""
        layout = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        pinned = self._may_pin and any(tensor.is_cuda for tensor in tensors.values())
        if layout != self._layout or (pinned and self._unpin is None):
            starts, size = [], 0
            for tensor in tensors.values():
                starts.append(size)
                size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
            self._provide(size, pinned=pinned)
            self._views = {
                name: self._arena[start : start + tensor.numel() * tensor.element_size()]
                .view(tensor.dtype)
                .view(tensor.shape)
                for start, (name, tensor) in zip(starts, tensors.items(), strict=True)
            }
            self._layout = layout
        return self._views

    def _provide(self, size: int, *, pinned: bool) -> None:
        if size <= self._arena.numel() and (self._unpin is not None or not pinned):
            return
        self._views, self._layout = {}, ()
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._arena = torch.empty(0, dtype=torch.uint8)  # the old memory goes before the new comes
        self._arena = _whole_pages(size) if pinned else torch.empty(size, dtype=torch.uint8)
        if pinned and size:
            self._may_pin = _pin(self._arena)
            if self._may_pin:
                self._unpin = weakref.finalize(self, _unpin, self._arena, self._device_copies)


class _DeviceCopies:
    """Copies from CUDA devices under way: the early ones first, on a stream of their own for each device."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._ends: list[tuple[torch.device, torch.cuda.Event]] = []

    def order(self, tensors: Mapping[K, Tensor], views: Mapping[K, Tensor], late: Collection[K]) -> None:
        """Order the copy of `tensors` into `views`; an earlier one must have ended."""
        self._ends = []
        for device in {tensor.device for tensor in tensors.values()}:
            here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            self._order_on(device, here, views, set(late))

    def _order_on(
        self, device: torch.device, tensors: Mapping[K, Tensor], views: Mapping[K, Tensor], late: set[K]
    ) -> None:
        training = torch.cuda.current_stream(device)
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side = self._streams[device]
        side.wait_stream(training)
        with torch.cuda.stream(side):
            try:
                self._copy(tensors, views, [name for name in tensors if name not in late], side)
                training.wait_event(side.record_event())
                self._copy(tensors, views, [name for name in tensors if name in late], side)
            finally:  # also after an error: what was ordered before it still writes into the buffer
                asleep = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                self._ends.append((device, side.record_event(asleep)))

    @staticmethod
    def _copy(tensors: Mapping[K, Tensor], views: Mapping[K, Tensor], names: list[K], side: torch.cuda.Stream) -> None:
        for name in names:
            views[name].copy_(tensors[name], non_blocking=True)
            tensors[name].record_stream(side)  # its memory is not given to others before it is copied

    def wait_on_device(self) -> None:
        for device, end in self._ends:
            torch.cuda.current_stream(device).wait_event(end)

    def wait_on_host(self) -> None:
        for _, end in self._ends:
            end.synchronize()  # from any thread, asleep, without Python's lock


def _whole_pages(size: int) -> Tensor:
    """Memory of at least `size` bytes that shares no page with anything else: pages are locked whole, and once."""
    memory = torch.empty(size + 2 * _PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % _PAGE
    return memory[start : start + -(-size // _PAGE) * _PAGE]


def _pin(memory: Tensor) -> bool:
    """Page-lock memory in place: torch's own pinned allocator rounds sizes up to powers of two. Whether it could be."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE))
    if code == 0:
        return True
    _absorb_error()
    log.warning(
        "%d bytes of host memory could not be page-locked (CUDA error %d; see ulimit -l): each save waits until its "
        "copy is made, and is as safe",
        memory.numel(),
        code,
    )
    return False


def _absorb_error() -> None:
    """CUDA keeps an error for the launch that comes next, which is not to be one of the training."""
    try:
        torch.zeros(1, device="cuda")
    except RuntimeError as error:
        log.debug("what CUDA had kept: %s", error)


def _unpin(memory: Tensor, copies: _DeviceCopies) -> None:
    copies.wait_on_host()  # the device must not write into memory that is given back
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.data_ptr())
