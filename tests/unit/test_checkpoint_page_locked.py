"""What a machine without a CUDA device can tell of buffers that are page-locked for one (test_checkpoint_gpu.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dino_exp.checkpoint import snapshot
from dino_exp.checkpoint.snapshot import HostBuffers


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a CUDA device, as far as a machine without one can tell."""

    is_cuda = True


def test_where_memory_cannot_be_page_locked_copies_are_made_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing:
        asked = 0

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            self.asked += 1
            return 2  # cudaErrorMemoryAllocation

    def copy_at_once(_: Any, tensors: dict[str, torch.Tensor], views: dict[str, torch.Tensor], late: Any) -> None:
        for name, tensor in tensors.items():
            views[name].copy_(tensor.as_subclass(torch.Tensor))

    runtime = Refusing()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(snapshot, "_absorb_error", lambda: None)
    monkeypatch.setattr(snapshot._DeviceCopies, "order", copy_at_once)
    buffers = HostBuffers()
    for factor in (1, 2, 3):
        tensors = {"one": (factor * torch.ones(1000)).as_subclass(Elsewhere)}
        assert torch.equal(buffers.copy(tensors)["one"], torch.full((1000,), float(factor)))
    assert runtime.asked == 1, "it will not do the next time either"
    (message,) = [entry.message for entry in caplog.records if entry.levelname == "WARNING"]
    assert "4096 bytes of host memory could not be page-locked (CUDA error 2" in message
