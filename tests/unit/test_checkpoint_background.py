"""Saving beside the training: what is written is the state of the requested step, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    SCHEDULE,
    Events,
    FaultyFiles,
    GatedFiles,
    ToyState,
    flip,
    io_error,
    open_manager,
    pack_of,
    quick_files,
    request,
    save_steps,
)

from dino_exp.checkpoint.finite import is_finite
from dino_exp.checkpoint.pace import Pace
from dino_exp.checkpoint.policies import BestN, EveryEpochs, EverySteps, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.snapshot import HostBuffers
from dino_exp.checkpoint.tensors import tensor_bytes
from dino_exp.checkpoint.types import SaveContext
from dino_exp.checkpoint.writing import NonFiniteStateError
from dino_exp.errors import CheckpointError, LockedError, SaveFailedError


def context(step: int, **fields: Any) -> SaveContext:
    return SaveContext(step=step, schedule=SCHEDULE, **fields)


def test_what_is_written_is_the_state_of_the_requested_step(tmp_path: Path) -> None:
    files = GatedFiles()
    manager = open_manager(tmp_path, background=True, files=files)
    state = ToyState(3)
    manager.save(state, request(3))
    for tensor in state.tensors.values():
        tensor.fill_(99)
    state.values["loader.position"] = 99
    state.values["best"]["step"] = 99
    assert files.reached.wait(60)
    assert manager.is_saving
    assert manager.poll() is None
    assert manager.latest_step() == 3
    assert CheckpointReader(tmp_path).num_found() == 0
    files.gate.set()
    manifest = manager.drain()
    assert manifest is not None
    assert manifest.step == 3
    assert manager.poll() is None, "a save is told once"
    restored = ToyState()
    open_manager(tmp_path, attempt=2).restore(restored)
    assert restored.is_of_step(3)


def test_a_failed_save_is_raised_at_the_next_step_and_the_next_one_succeeds(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    files = FaultyFiles(13, io_error, once=True)
    manager = open_manager(tmp_path, background=True, files=files, attempt=2)
    manager.save(ToyState(2), request(2))
    while manager.is_saving:
        pass
    with pytest.raises(SaveFailedError, match=r"step 2 was not saved: .*Input/output error") as caught:
        manager.poll()
    assert caught.value.step == 2
    assert manager.latest_step() == 1
    assert manager.poll() is None
    manager.save(ToyState(3), request(3))
    assert manager.drain() is not None
    assert [row["step"] for row in CheckpointReader(tmp_path).rows()] == [1, 3]
    assert len(list((tmp_path / "packs").iterdir())) == 2


def test_an_error_that_nobody_polled_for_is_raised_by_the_next_save(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, background=True, guard=refuse)
    manager.save(ToyState(1), request(1))
    with pytest.raises(LockedError, match="another's"):
        manager.save(ToyState(2), request(2))
    assert CheckpointReader(tmp_path).num_found() == 0


def refuse() -> None:
    raise LockedError("the run is another's now")


def test_a_save_that_is_due_by_an_interval_is_skipped_while_another_is_under_way(tmp_path: Path) -> None:
    files, events = GatedFiles(), Events()
    manager = open_manager(tmp_path, background=True, files=files, on_event=events, save=EverySteps(1))
    assert manager.due(context(1)) == ("every 1 steps",)
    manager.save(ToyState(1), request(1))
    assert files.reached.wait(60)
    assert manager.due(context(2)) == ()
    assert manager.due(context(3)) == ()
    assert events.of("skipped") == [{"step": 2, "reasons": ["every 1 steps"], "under_way": 1}]
    files.gate.set()
    manager.drain()
    assert manager.due(context(4)) == ("every 1 steps",)


def test_a_save_of_this_very_step_waits_for_the_one_under_way(tmp_path: Path) -> None:
    files = GatedFiles()
    manager = open_manager(tmp_path, background=True, files=files, save=EveryEpochs(1))
    manager.save(ToyState(1), request(1))
    assert files.reached.wait(60)
    assert manager.due(context(2)) == ("epoch 1",)
    threading.Timer(0.1, files.gate.set).start()
    manager.save(ToyState(2), request(2))
    manager.drain()
    assert [info.step for info in manager.infos()] == [1, 2]


def test_rows_reach_the_disk_before_the_manifest(tmp_path: Path) -> None:
    seen: list[int] = []
    manager = open_manager(tmp_path, background=True)
    manager.save(ToyState(1), request(1), before_commit=lambda: seen.append(CheckpointReader(tmp_path).num_found()))
    manager.drain()
    assert seen == [0]
    assert CheckpointReader(tmp_path).num_found() == 1


def test_rows_that_cannot_be_synced_prevent_the_commit(tmp_path: Path) -> None:
    def fail() -> None:
        raise io_error()

    manager = open_manager(tmp_path, background=True)
    manager.save(ToyState(1), request(1), before_commit=fail)
    with pytest.raises(SaveFailedError):
        manager.drain()
    assert CheckpointReader(tmp_path).num_found() == 0
    assert not list((tmp_path / "packs").iterdir())


def test_bytes_that_come_back_otherwise_are_no_checkpoint(tmp_path: Path) -> None:
    def damage() -> None:
        flip(pack_of(tmp_path, 2))

    manager = save_steps(tmp_path, [1], background=True)
    manager.save(ToyState(2), request(2), before_commit=damage)
    with pytest.raises(SaveFailedError, match="read back"):
        manager.drain()
    assert [info.step for info in manager.infos()] == [1]
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["step-000000002.q001"]


# --- the host copy ----------------------------------------------------------------------------------------------


def state_tensors() -> dict[str, torch.Tensor]:
    shared = torch.arange(6.0)
    return {
        "float": torch.randn(3, 5),
        "transposed": torch.randn(4, 7).T,
        "strided": torch.arange(20)[::3],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 2),
        "half": torch.randn(5).to(torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "one": shared[:4],
        "other": shared[2:],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


def test_a_host_copy_has_the_same_values_and_shares_nothing() -> None:
    tensors, buffers = state_tensors(), HostBuffers()
    copies = buffers.copy(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor.detach()), name
        assert copies[name].is_contiguous()
        assert copies[name].dtype == tensor.dtype
    before = {name: copy.clone() for name, copy in copies.items()}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    assert all(torch.equal(copies[name], before[name]) for name in tensors)


def test_host_memory_is_used_again_and_holds_one_copy() -> None:
    tensors = {str(number): torch.randn(1000 + number) for number in range(50)}
    buffers = HostBuffers()
    first = buffers.copy(tensors)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    assert buffers.num_bytes <= 1.1 * sum(tensor.numel() * 4 for tensor in tensors.values())
    assert {name: copy.data_ptr() for name, copy in buffers.copy(tensors).items()} == places
    more = tensors | {"moment": torch.randn(100_000)}  # an optimizer's moments come with its first step
    assert torch.equal(buffers.copy(more)["moment"], more["moment"])
    assert buffers.num_bytes <= 1.1 * sum(tensor.numel() * 4 for tensor in more.values())
    held = buffers.num_bytes
    assert torch.equal(buffers.copy(tensors)["0"], tensors["0"])
    assert buffers.num_bytes == held, "memory that is there is kept"


MEMORY_PROGRAM = """
import sys, torch
sys.path.insert(0, {tests!r})
from pathlib import Path
from support.checkpoints import open_manager, request
from dino_exp.allocator import keep_freed_memory

keep_freed_memory()  # as a training does

class Big:
    def __init__(self): self.tensors = {{str(n): torch.ones(1 << 22) * n for n in range(16)}}
    def state_dict(self): return self.tensors

# not ru_maxrss: a process begins with that of the one that started it
peak = lambda: 1024 * int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
state, manager = Big(), open_manager(Path({folder!r}), background=True)
num_bytes = sum(tensor.numel() * 4 for tensor in state.tensors.values())
before = peak()
for step in range(1, 4):
    manager.save(state, request(step))
manager.drain()
print((peak() - before) / num_bytes)
"""


def test_a_save_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    """Measured in a process of its own: 268 MB of state, three saves, at most one copy and a tenth."""
    program = MEMORY_PROGRAM.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path / "c"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.9 <= float(done.stdout) <= 1.1


# --- trouble ----------------------------------------------------------------------------------------------------


class FullDisk(FaultyFiles):
    """A disk that says that it has `free` bytes; each pack that goes gives some back."""

    def __init__(self, free: int, gain: int) -> None:
        super().__init__(0, once=True)
        self.free, self.gain = free, gain

    def free_bytes(self, path: Path) -> int:
        return self.free

    def unlink(self, path: Path) -> None:
        self.inner.unlink(path)
        if path.suffix == ".safetensors":
            self.free += self.gain


def test_a_full_disk_drops_early_what_retention_would_drop_next(tmp_path: Path) -> None:
    keep = KeepAny((LatestN(2),))
    save_steps(tmp_path, [1, 2], keep=keep)
    events = Events()
    manager = open_manager(tmp_path, keep=keep, files=FullDisk(0, gain=10**9), on_event=events, attempt=2)
    manager.save(ToyState(3), request(3))
    assert [info.step for info in manager.infos()] == [2, 3]
    assert events.of("dropped") == [
        {"step": 1, "reason": "drop: older than last 2; early, because the disk is full"},
    ]
    assert "0.0 MB free" in events.of("trouble")[0]["error"]


def test_a_full_disk_never_costs_the_only_good_state(tmp_path: Path) -> None:
    keep = KeepAny((LatestN(1), BestN("knn_top1")))
    save_steps(tmp_path, [1], keep=keep)
    manager = open_manager(tmp_path, keep=keep, files=FullDisk(0, gain=10**9), background=True, attempt=2)
    manager.save(ToyState(2), request(2, metrics={"knn_top1": 0.9}))
    with pytest.raises(SaveFailedError, match=r"0\.0 MB free, the checkpoint needs 0\.1 MB"):
        manager.drain()
    state = ToyState()
    manager.restore(state)
    assert state.is_of_step(1)


def test_pins_that_cannot_be_read_make_no_room(tmp_path: Path) -> None:
    keep = KeepAny((LatestN(2),))
    save_steps(tmp_path, [1, 2], keep=keep)
    (tmp_path / "pins.json").write_text("{")
    manager = open_manager(tmp_path, keep=keep, files=FullDisk(0, gain=10**9), attempt=2)
    with pytest.raises(SaveFailedError):
        manager.save(ToyState(3), request(3))
    assert CheckpointReader(tmp_path).num_found() == 2


def test_a_read_only_folder_is_one_error(tmp_path: Path) -> None:
    def read_only() -> OSError:
        return OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.raises(OSError, match="Read-only"):
        open_manager(tmp_path / "c", files=FaultyFiles(1, read_only))
    manager = save_steps(tmp_path / "d", [1], files=(files := quick_files()))
    files.fail_at, files.error, files.once = files.num_calls + 1, read_only, False
    with pytest.raises(SaveFailedError, match="Read-only"):
        manager.save(ToyState(2), request(2))
    assert [row["step"] for row in CheckpointReader(tmp_path / "d").rows()] == [1]


def test_a_clock_that_goes_backwards_orders_nothing(tmp_path: Path) -> None:
    times = iter([5e9, 4e9, 3e9, 2e9, 1e9])
    manager = save_steps(tmp_path, [1, 2, 3, 4], clock=lambda: next(times), background=True)
    assert [info.step for info in manager.infos()] == [2, 3, 4]
    assert manager.latest_step() == 4


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, float("nan")),
        (torch.float32, float("inf")),
        (torch.float64, float("-inf")),
        (torch.float16, float("nan")),
        (torch.bfloat16, float("inf")),
        (torch.bfloat16, float("nan")),
    ],
)
def test_numbers_that_are_not_finite_are_found(dtype: torch.dtype, value: float) -> None:
    name = str(dtype).removeprefix("torch.")
    numbers = torch.full((3_000_000,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor_bytes(numbers), name)
    numbers[-1] = value
    assert not is_finite(tensor_bytes(numbers), name)
    assert is_finite(tensor_bytes(torch.arange(9)), "int64")


@pytest.mark.parametrize("beside", [True, False])
def test_nothing_poisoned_is_committed(tmp_path: Path, beside: bool) -> None:
    manager = save_steps(tmp_path, [1], background=beside, require_finite=True)
    state = ToyState(2)
    state.tensors["student.weight"][0, 0] = float("nan")

    def save() -> None:
        manager.save(state, request(2))
        manager.drain()

    with pytest.raises(NonFiniteStateError, match=r"student\.weight holds NaN"):
        save()
    assert [info.step for info in manager.infos()] == [1]
    assert len(list((tmp_path / "packs").iterdir())) == 1


def test_a_state_that_is_no_state_is_refused_at_once(tmp_path: Path) -> None:
    manager = open_manager(tmp_path, background=True)
    state = ToyState(1)
    state.values["bad"] = object()
    with pytest.raises(CheckpointError, match="bad: found object"):
        manager.save(state, request(1))
    assert manager.latest_step() is None


# --- the thread and its pace ------------------------------------------------------------------------------------


def test_a_limited_writer_waits_until_its_bytes_are_due() -> None:
    now, waits = [100.0], list[float]()
    pace = Pace(1000.0, clock=lambda: now[0])
    pace.wait = waits.append  # type: ignore[method-assign]
    pace.begin()
    pace.wrote(500)
    now[0] += 2.0
    pace.wrote(500)
    assert waits == [0.5, 0.0]
    Pace(None, clock=lambda: now[0]).wrote(10**12)


def test_whoever_waits_for_a_save_lifts_its_limit(tmp_path: Path) -> None:
    """Without that, 24 bytes at a hundredth of a byte a second would take forty minutes."""
    manager = open_manager(tmp_path, background=True, max_bytes_per_sec=0.01)
    manager.save(ToyState(1), request(1))
    assert manager.drain() is not None
