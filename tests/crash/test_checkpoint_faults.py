"""The fault at the 1st, 2nd, 3rd ... file operation, until one run finishes without a fault.

After each: the newest acknowledged checkpoint restores (or a newer one), every listed one restores, nothing else is
listed, and the run goes on.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    KINDS,
    Died,
    FaultyFiles,
    Kind,
    PowerLossFiles,
    ToyState,
    io_error,
    no_space,
    open_manager,
    quick_files,
    request,
    save_steps,
)

from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import SaveFailedError

STEPS = range(1, 5)
CRASH = pytest.mark.crash
Stop = type[BaseException] | tuple[type[BaseException], ...]
Choice = random.Random | bool
Survived = Callable[[str, int], None]
POWER_LOSSES = "power losses, each with another order of what reached the disk"


def check_survival(folder: Path, acknowledged: int | None, kind: Kind = KINDS["raw"]) -> None:
    """What must hold after any fault."""
    reader = CheckpointReader(folder)
    assert reader.verify()["ok"], reader.verify()
    listed = [row["step"] for row in reader.rows()]
    manager = kind.open_manager(folder, attempt=2, files=quick_files())
    assert [info.step for info in manager.infos()] == listed
    assert {name.name for name in folder.iterdir()} <= {
        "packs",
        "quarantine",
        "registry.json",
        *(f"step-{step:09d}.json" for step in listed),
    }
    reached = {pack.name for step in listed for pack in reader.manifest(step).packs}
    assert {path.name for path in (folder / "packs").iterdir()} == reached
    for step in listed:
        assert loads(reader, step, kind)
    if acknowledged is not None:
        state = kind.make()
        restored = manager.restore(state)
        assert restored.manifest.step >= acknowledged
        assert state.is_of_step(restored.manifest.step)
        assert not restored.quarantined
    manager.save(kind.make(7), request(7))
    assert CheckpointReader(folder).verify()["ok"]


def loads(reader: CheckpointReader, step: int, kind: Kind) -> bool:
    """Whether a checkpoint holds the state of its step, or the part that was to stay of a thinned one."""
    manifest, expected = reader.manifest(step), kind.make(step)
    if manifest.resumable:
        reader.restore(state := kind.make(), step)
        return state.is_of_step(step)
    found = reader.load_tensors(step)
    wanted = {name: tensor for name, tensor in expected.tensors.items() if name.startswith("teacher.")}
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def save_until_fault(
    folder: Path, files: object, stop: Stop, *, beside: bool = True, kind: Kind = KINDS["raw"]
) -> tuple[int | None, bool]:
    """Save the steps, in the background or at once; the last acknowledged one, and whether all went well."""
    acknowledged = None
    try:
        manager = kind.open_manager(folder, files=files, background=beside)
        for step in STEPS:
            manager.save(kind.make(step), request(step))
            manager.drain()
            acknowledged = step
    except stop:
        return acknowledged, False
    return acknowledged, True


@pytest.mark.parametrize(
    ("beside", "kind", "stride"),
    [
        (True, "raw", 1),
        (False, "raw", 3),
        (True, "thinned", 19),
        pytest.param(False, "raw", 1, marks=CRASH),
        pytest.param(True, "thinned", 1, marks=CRASH),
        pytest.param(False, "delta", 1, marks=CRASH),
        pytest.param(True, "zstd", 1, marks=CRASH),
    ],
)
def test_death_at_every_file_operation(
    tmp_path: Path, beside: bool, kind: str, stride: int, survived: Survived
) -> None:
    for fail_at in range(1, 10_000, stride):
        folder = tmp_path / f"{fail_at}"
        acknowledged, finished = save_until_fault(folder, FaultyFiles(fail_at), Died, beside=beside, kind=KINDS[kind])
        if folder.exists():
            check_survival(folder, acknowledged, KINDS[kind])
            shutil.rmtree(folder)
        if finished:
            break
    assert fail_at > 100  # as many operations as that were failed, or every `stride`-th of them
    survived("file operations at which the process died", fail_at // stride)


@pytest.mark.parametrize(
    ("kind", "stride"),
    [
        ("raw", 3),
        ("thinned", 61),
        pytest.param("raw", 1, marks=CRASH),
        pytest.param("thinned", 1, marks=CRASH),
        pytest.param("delta", 1, marks=CRASH),
    ],
)
@pytest.mark.parametrize("error", [no_space, io_error])
@pytest.mark.parametrize("once", [True, False])
def test_an_error_at_every_file_operation(
    tmp_path: Path, error: Callable[[], OSError], once: bool, kind: str, stride: int, survived: Survived
) -> None:
    """One error, or a disk that stays full: nothing acknowledged is lost, and a later save succeeds."""
    for fail_at in range(1, 10_000, stride):
        folder = tmp_path / f"{fail_at}"
        files = FaultyFiles(fail_at, error, once)
        acknowledged, _ = save_until_fault(folder, files, (OSError, SaveFailedError), kind=KINDS[kind])
        if folder.exists():
            check_survival(folder, acknowledged, KINDS[kind])
            shutil.rmtree(folder)
        if files.num_calls < fail_at:
            break
    assert fail_at > 100
    survived("file operations that failed", fail_at // stride)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=CRASH)])
def test_the_same_manager_goes_on_after_one_error(tmp_path: Path, stride: int, survived: Survived) -> None:
    """Training goes on after a failed save: the next one, or the same one again, succeeds."""
    for fail_at in range(8, 10_000, stride):
        folder = tmp_path / f"{fail_at}"
        files = FaultyFiles(fail_at, io_error, once=True)
        try:
            manager = open_manager(folder, files=files, background=True)
        except OSError:
            continue
        for step in STEPS:
            manager.save(ToyState(step), request(step))
            try:
                manager.drain()
            except SaveFailedError:
                manager.save(ToyState(step), request(step))
                manager.drain()
        check_survival(folder, STEPS[-1])
        shutil.rmtree(folder)
        if files.num_calls < fail_at:
            break
    assert fail_at > 100
    survived("file operations that failed", (fail_at - 8) // stride)


def check_power_loss(
    tmp_path: Path,
    files: PowerLossFiles,
    acknowledged: int | None,
    choices: list[Choice],
    kind: Kind = KINDS["raw"],
) -> int:
    """Try each choice of what was written and not synced; how many that were."""
    disk = tmp_path / "disk"
    for choice in choices:
        files.surviving(disk, choice)
        if (disk / "live").exists():
            check_survival(disk / "live", acknowledged, kind)
        shutil.rmtree(disk)
    shutil.rmtree(tmp_path / "live", ignore_errors=True)
    return len(choices)


@pytest.mark.parametrize(("kind", "stride"), [("raw", 1), ("thinned", 29)])
def test_power_loss_at_every_file_operation(tmp_path: Path, kind: str, stride: int, survived: Survived) -> None:
    num = 0
    for die_at in range(1, 10_000, stride):
        files = PowerLossFiles(tmp_path, die_at)
        acknowledged, finished = save_until_fault(tmp_path / "live", files, Died, kind=KINDS[kind])
        num += check_power_loss(tmp_path, files, acknowledged, [False, random.Random(die_at)], KINDS[kind])
        if finished:
            break
    assert die_at > 60
    survived(POWER_LOSSES, num)


@pytest.mark.crash
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("kind", "num_orders"), [("raw", 50), ("delta", 12), ("thinned", 12)])
def test_power_loss_with_many_orders(tmp_path: Path, kind: str, num_orders: int, survived: Survived) -> None:
    num = 0
    for die_at in range(1, 10_000):
        files = PowerLossFiles(tmp_path, die_at)
        acknowledged, finished = save_until_fault(tmp_path / "live", files, Died, kind=KINDS[kind])
        choices: list[Choice] = [True, False, *(random.Random(100 * die_at + n) for n in range(num_orders))]
        num += check_power_loss(tmp_path, files, acknowledged, choices, KINDS[kind])
        if finished:
            break
    survived(POWER_LOSSES, num)


@pytest.mark.crash
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("error_first", [True, False])
def test_power_loss_soon_after_another_fault(tmp_path: Path, error_first: bool, survived: Survived) -> None:
    """A process dies, or gets an I/O error, and the next few operations end in a power loss."""
    num = 0
    for fault_at in range(1, 10_000):
        for later in range(1, 14):
            die_at = fault_at + later if error_first else fault_at
            files = PowerLossFiles(tmp_path, die_at, fault_at if error_first else 0)
            acknowledged, finished = save_until_fault(tmp_path / "live", files, (Died, OSError, SaveFailedError))
            files.die_at, files.error_at = fault_at + later, 0
            with contextlib.suppress(Died):
                manager = open_manager(tmp_path / "live", files=files, attempt=2)
                manager.save(ToyState(6), request(6))
            orders: list[Choice] = [False, *(random.Random(die_at + n) for n in range(3))]
            num += check_power_loss(tmp_path, files, acknowledged, orders)
        if finished:
            break
    survived(POWER_LOSSES, num)


def test_death_while_opening_after_death(tmp_path: Path, survived: Survived) -> None:
    """The sweep and the quarantine of a restart may die too."""
    first = tmp_path / "first"
    save_steps(first, range(1, 4))
    (first / "packs" / "step-000000004.a001.r00000.safetensors").write_bytes(b"torn")
    (first / ".step-000000004.json.tmp").write_bytes(b"{")
    pack = first / "packs" / "step-000000003.a001.r00000.safetensors"
    pack.write_bytes(pack.read_bytes()[:-1])
    for fail_at in range(1, 1000):
        folder = tmp_path / "again"
        shutil.copytree(first, folder)
        files = FaultyFiles(fail_at)
        try:
            open_manager(folder, files=files, attempt=2).restore(ToyState())
        except Died:
            state = ToyState()
            assert open_manager(folder, attempt=3, files=quick_files()).restore(state).manifest.step == 2
            assert state.is_of_step(2)
            kept = [path.name for path in folder.rglob("step-000000003.*.safetensors")]
            assert kept, "what is damaged is moved, never lost"
        shutil.rmtree(folder)
        if files.num_calls < fail_at:
            break
    assert fail_at > 20
    survived("file operations at which the process died", fail_at - 1)
