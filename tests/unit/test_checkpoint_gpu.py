"""Saving from a CUDA device: page-locked buffers, early and late tensors, a state that goes on changing, generators.

Written on a machine without a CUDA device, and run on none so far: kept plain for that reason. Run it with
`pytest -m gpu tests/unit/test_checkpoint_gpu.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import open_manager, request

from dino_exp.checkpoint.generators import restore_generators
from dino_exp.checkpoint.snapshot import HostBuffers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine"),
]
SIZE = 1 << 24  # numbers in each tensor: 64 MB, whose copy takes longer than to order a change of them


def on_device(value: float) -> torch.Tensor:
    return torch.full((SIZE,), value, device="cuda")


def test_copies_are_equal_and_page_locked() -> None:
    tensors = {
        "float": torch.randn(3, 5, device="cuda"),
        "transposed": torch.randn(4, 7, device="cuda").T,
        "half": torch.randn(5, device="cuda", dtype=torch.bfloat16),
        "scalar": torch.tensor(3, device="cuda"),
        "empty": torch.empty(0, 2, device="cuda"),
        "parameter": torch.nn.Parameter(torch.randn(2, device="cuda")),
        "of the host": torch.arange(4),
    }
    buffers = HostBuffers()
    for _ in range(3):  # into the same memory
        copies = buffers.copy(tensors, late={"parameter"})
        buffers.wait_on_host()
        for name, tensor in tensors.items():
            assert torch.equal(copies[name], tensor.detach().cpu()), name
            assert not copies[name].is_cuda
            assert copies[name].numel() == 0 or copies[name].is_pinned()
        tensors["float"] += 1


def test_early_tensors_may_be_changed_at_once() -> None:
    tensors, buffers = {"early": on_device(1), "late": on_device(1)}, HostBuffers()
    for value in (1.0, 2.0, 3.0):
        copies = buffers.copy(tensors, late={"late"})
        tensors["early"].fill_(value + 1)  # waits for its copy on the device, not here
        buffers.wait_on_device()
        tensors["late"].fill_(value + 1)
        buffers.wait_on_host()
        assert torch.equal(copies["early"], torch.full((SIZE,), value))
        assert torch.equal(copies["late"], torch.full((SIZE,), value))


def test_a_copy_waits_for_one_whose_save_was_given_up() -> None:
    buffers = HostBuffers()
    buffers.copy({"one": on_device(1), "two": on_device(1)}, late={"one", "two"})
    copies = buffers.copy({"one": on_device(2), "two": on_device(2)}, late={"one", "two"})
    buffers.wait_on_host()
    assert torch.equal(copies["one"], torch.full((SIZE,), 2.0))
    assert torch.equal(copies["two"], torch.full((SIZE,), 2.0))


def test_memory_of_a_tensor_that_is_gone_is_not_used_again_before_it_is_copied() -> None:
    buffers = HostBuffers()
    copies = buffers.copy({"moment": on_device(1)}, late={"moment"})
    others = [on_device(2) for _ in range(4)]  # would get the memory of the first one
    buffers.wait_on_host()
    assert torch.equal(copies["moment"], torch.full((SIZE,), 1.0))
    assert len(others) == 4


def test_page_locked_memory_is_given_back() -> None:
    copy = {}
    for size in (1000, 10_000, 100_000):  # grows, and is page-locked anew
        buffers = HostBuffers()
        for factor in (1, 2):
            copy = buffers.copy({"one": torch.ones(size * factor, device="cuda")})
        buffers.wait_on_host()
        assert copy["one"].is_pinned()
        del buffers
        gc.collect()
        assert not copy["one"].is_pinned(), "its bytes are still there, and no longer locked"
        assert torch.equal(copy["one"], torch.ones(2 * size))


def test_a_buffer_that_held_a_host_state_is_page_locked_for_a_device() -> None:
    buffers = HostBuffers()
    assert not buffers.copy({"one": torch.ones(1000)})["one"].is_pinned()
    copies = buffers.copy({"one": torch.ones(1000, device="cuda")})
    buffers.wait_on_host()
    assert copies["one"].is_pinned()


def test_memory_that_cannot_be_page_locked_does(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = torch.cuda.cudart()

    class Refusing:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            return int(runtime.cudaHostRegister(0, size, flags))  # an invalid address: CUDA keeps that error

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    tensors, buffers = {"early": on_device(1), "late": on_device(1)}, HostBuffers()
    for value in (1.0, 2.0):
        copies = buffers.copy(tensors, late={"late"})
        tensors["early"].fill_(value + 1)
        buffers.wait_on_device()
        tensors["late"].fill_(value + 1)
        buffers.wait_on_host()
        for name in tensors:
            assert torch.equal(copies[name], torch.full((SIZE,), value)), name
            assert not copies[name].is_pinned()


class DeviceState:
    """Parameters on the device that each step changes, and a statistic that moves in the forward pass."""

    def __init__(self) -> None:
        self.weight, self.statistic = on_device(0), on_device(0)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "statistic": self.statistic}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight.copy_(state["weight"])
        self.statistic.copy_(state["statistic"])

    def is_of_step(self, step: int) -> bool:
        return bool((self.weight == step).all()) and bool((self.statistic == step).all())


def test_what_is_written_is_the_state_of_the_requested_step(tmp_path: Path) -> None:
    state = DeviceState()
    manager = open_manager(tmp_path, background=True)
    for step in range(1, 9):
        state.statistic += 1  # in the forward pass
        manager.before_update()
        state.weight += 1
        if step % 2 == 0:
            manager.save(state, request(step), late={"weight"})
    manager.drain()
    steps = [info.step for info in manager.infos()]
    assert steps[-1] == 8
    for step in steps:
        restored = DeviceState()
        manager.restore(restored, at=step)
        assert restored.is_of_step(step)


def test_saving_at_once_needs_no_buffers(tmp_path: Path) -> None:
    state = DeviceState()
    state.weight += 1
    state.statistic += 1
    manager = open_manager(tmp_path, background=False)
    manager.save(state, request(1))
    restored = DeviceState()
    manager.restore(restored)
    assert restored.is_of_step(1)


def test_generators_of_the_device_come_back(tmp_path: Path) -> None:
    state = DeviceState()
    manager = open_manager(tmp_path, background=True)
    manager.save(state, request(1))
    expected = torch.rand(5, device="cuda")
    torch.rand(5, device="cuda")
    manifest = manager.drain()
    assert manifest is not None
    assert restore_generators(manifest)
    assert torch.equal(torch.rand(5, device="cuda"), expected)
