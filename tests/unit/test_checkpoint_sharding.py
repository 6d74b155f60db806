"""Checkpoints by several ranks: what each writes, that it is one state, and that faults of one are faults of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import FaultyFiles, bits, no_space, request
from support.ensemble import Ensemble, PartState, each

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.policies import AnyOf, KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.sharding import member as member_module
from dino_exp.checkpoint.sharding import team as team_module
from dino_exp.checkpoint.sharding.planning import SharePlanner
from dino_exp.checkpoint.types import SaveProgress
from dino_exp.checkpoint.writers import OneWriter
from dino_exp.dist.council import LostRankError
from dino_exp.errors import CheckpointError, NoCheckpointError, SaveFailedError

CODECS = ("raw", "zstd", "delta")


def tensors(step: int = 0) -> dict[str, torch.Tensor]:
    """One that weighs more than the rest together, some of other types, some of no size."""
    generator = torch.Generator().manual_seed(step)
    small = {f"student.block{at}": torch.randn(20 + at, 16, generator=generator) for at in range(12)}
    return {
        **small,
        "student.prototypes": torch.randn(600, 16, generator=generator),
        "teacher.prototypes": torch.randn(600, 16, generator=generator),
        "loss.center": torch.randn(1, 64, generator=generator, dtype=torch.float64),
        "optimizer.step": torch.tensor(float(step)),
        "loss.empty": torch.empty(0, 3),
        "student.flags": torch.arange(9, dtype=torch.uint8),
    }


def states(size: int, step: int = 0) -> list[PartState]:
    """The same on every rank, as data parallel training has it."""
    return [PartState(tensors(step), step) for _ in range(size)]


def assert_same(found: PartState, step: int) -> None:
    for name, tensor in tensors(step).items():
        assert bits(found.tensors[name]) == bits(tensor), name
    assert found.value == step


def digest_of_one(folder: Path, step: int) -> str:
    manager = CheckpointManager(folder, save=AnyOf(()), keep=KeepAny((LatestN(1),)))
    manager.save(PartState(tensors(step), step), request(step))
    committed = manager.drain()
    assert committed is not None
    assert committed.state_digest is not None
    return committed.state_digest


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_state_saved_by_many_is_that_of_one(codec: str, size: int, tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path / "many", size, codec=codec)
    for step in (1, 2):
        told = ensemble.save(states(size, step), step)
        assert [one.step for one in told] == [step] * size, told
    reader = CheckpointReader(tmp_path / "many")
    assert reader.verify()["ok"]
    assert reader.manifest(2).world_size == len(reader.manifest(2).generators) == size
    assert reader.state_digest(2) == digest_of_one(tmp_path / "one", 2)
    loaded = reader.load_tensors(2)
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {
        name: bits(tensor) for name, tensor in tensors(2).items()
    }
    # ... and by any number of ranks, one among them.
    for other in (1, 2, 4):
        fresh = states(other)
        if other == 1:
            CheckpointReader(tmp_path / "many").restore(fresh[0])
        else:
            told = Ensemble(tmp_path / "many", other, attempt=other).restore(fresh)
            assert [one.manifest.step for one in told] == [2] * other, told
        for state in fresh:
            assert_same(state, 2)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_each_rank_writes_its_share_of_the_bytes(size: int, tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, size)
    ensemble.save(states(size, 1), 1)
    manifest = CheckpointReader(tmp_path).manifest(1)
    contents = [pack.bytes - pack.header_bytes for pack in manifest.packs]
    assert len(contents) == size
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors().values())
    assert sum(contents) == total
    for content in contents:
        assert 0.8 / size <= content / total <= 1.2 / size


def test_few_ranks_write_tensors_whole_so_that_the_digest_is_known_at_once(tmp_path: Path) -> None:
    even = {f"student.block{at}": torch.randn(16, 16) for at in range(32)}
    Ensemble(tmp_path, 2).save([PartState(even), PartState(even)], 1)
    manifest = CheckpointReader(tmp_path).manifest(1)
    assert all(len(entry.chunks) == 1 for entry in manifest.tensors.values())
    assert manifest.state_digest is not None


def test_what_did_not_change_is_not_written_again_by_any_rank(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 3, codec="delta")
    for step in (1, 2):
        ensemble.save(states(3, 7), step)
    packs = {path.name for path in (tmp_path / "packs").iterdir()}
    assert all(name.startswith("step-000000001") for name in packs)
    assert len(packs) == 3


class AtWork(FaultyFiles):
    """Files of one rank in which one kind of operation fails."""

    def __init__(self, fails: str, error: Callable[[], BaseException]) -> None:
        super().__init__(0, once=True)
        self.fails, self.error = fails, error

    def tick(self) -> None:
        return

    def create(self, path: Path) -> Any:
        handle = super().create(path)
        if path.suffix == ".safetensors" and self.fails in ("write", "sync"):

            def fail(*_: object) -> None:
                raise self.error()

            setattr(handle, self.fails, fail)
        return handle

    def replace(self, source: Path, target: Path) -> None:
        if self.fails == "commit" and target.name.startswith("step-"):
            raise self.error()
        self.inner.replace(source, target)


PHASES = [("write", 0), ("write", 1), ("write", 2), ("sync", 0), ("sync", 1), ("sync", 2), ("commit", 0)]


@pytest.mark.parametrize(("phase", "rank"), PHASES)
def test_a_full_disk_of_one_rank_is_told_to_all_and_nothing_is_committed(phase: str, rank: int, tmp_path: Path) -> None:
    Ensemble(tmp_path, 3).save(states(3, 1), 1)
    ensemble = Ensemble(tmp_path, 3, attempt=2, files={rank: AtWork(phase, no_space)})
    told = ensemble.save(states(3, 2), 2)
    assert all(isinstance(one, SaveFailedError) for one in told), told
    assert len({str(one) for one in told}) == 1, told
    assert phase == "commit" or f"rank {rank}" in str(told[0])
    assert CheckpointReader(tmp_path).steps() == [1]
    assert not [path for path in (tmp_path / "packs").iterdir() if path.name.startswith("step-000000002")]
    assert [keeper.latest_step() for keeper in (ensemble.manager, *ensemble.members)] == [1, 1, 1]
    fresh = states(3)
    Ensemble(tmp_path, 3, attempt=3).restore(fresh)
    for state in fresh:
        assert_same(state, 1)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_after_a_failed_save_the_next_one_succeeds(rank: int, tmp_path: Path) -> None:
    files = AtWork("sync", no_space)
    ensemble = Ensemble(tmp_path, 3, files={rank: files})
    assert all(isinstance(one, SaveFailedError) for one in ensemble.save(states(3, 1), 1))
    files.fails = ""
    assert [one.step for one in ensemble.save(states(3, 2), 2)] == [2, 2, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_saves_that_are_not_in_the_background_fail_and_succeed_alike_on_all(rank: int, tmp_path: Path) -> None:
    files = AtWork("sync", no_space)
    ensemble = Ensemble(tmp_path, 2, files={rank: files}, background=False)
    keepers = [ensemble.manager, *ensemble.members]

    def save(at: int, step: int) -> None:
        keepers[at].save(states(2, step)[at], request(step))

    told = each([lambda at=at: save(at, 1) for at in range(2)])  # type: ignore[misc]
    assert all(isinstance(one, SaveFailedError) for one in told), "at once, and not when they are asked later"
    assert [keeper.latest_step() for keeper in keepers] == [None, None]
    assert [keeper.progress_of_save for keeper in keepers] == [SaveProgress.NONE] * 2
    files.fails = ""
    assert each([lambda at=at: save(at, 2) for at in range(2)]) == [None, None]  # type: ignore[misc]
    assert [keeper.progress_of_save for keeper in keepers] == [SaveProgress.ENDED] * 2
    assert [keeper.drain().step for keeper in keepers] == [2, 2]  # type: ignore[union-attr]


def test_a_step_that_is_saved_already_is_saved_again_by_no_rank(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 2)
    ensemble.save(states(2, 1), 1)
    assert ensemble.save(states(2, 1), 1) == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_our_own_in_one_rank_ends_the_save_of_all(rank: int, tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 2, files={rank: AtWork("write", lambda: ValueError("a bug"))})
    told = ensemble.save(states(2, 1), 1)
    assert all("a bug" in str(one) and isinstance(one, Exception) for one in told), told
    assert CheckpointReader(tmp_path).steps() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_part_is_not_finite_keeps_all_from_committing(rank: int, tmp_path: Path) -> None:
    bad = states(2, 1)
    for tensor in bad[rank].tensors.values():
        if tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[-1] = torch.nan
    told = Ensemble(tmp_path, 2, require_finite=True).save(bad, 1)
    assert all(isinstance(one, CheckpointError) and "NaN" in str(one) for one in told), told
    assert len({str(one) for one in told}) == 1
    assert CheckpointReader(tmp_path).steps() == []


@pytest.mark.parametrize("rank", [0, 1])
def test_bytes_that_one_rank_finds_changed_when_it_reads_back_are_written_again(rank: int, tmp_path: Path) -> None:
    """The first reading back of this rank sees a flipped bit: nothing was acknowledged, and the second try is good."""
    ensemble = Ensemble(tmp_path, 2, codec="zstd")
    real, seen = team_module.check_packs, []
    module: Any = team_module if rank == 0 else member_module

    def flipped(manifest: Any, store: Any, elsewhere: Any = ()) -> None:
        if not seen:
            seen.append(manifest)
            path = store.packs_folder / f"step-000000001.a001.r0000{rank}.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        real(manifest, store, elsewhere)

    module.check_packs = flipped
    try:
        told = ensemble.save(states(2, 1), 1)
    finally:
        module.check_packs = real
    assert [one.step for one in told] == [1, 1], told
    assert seen
    assert CheckpointReader(tmp_path).verify()["ok"]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_fault_in_planning_is_told_to_all(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = Ensemble(tmp_path, 3, timeout_secs=1.0)
    planners = [ensemble.leader._division, *(member._division for member in ensemble.members)]

    def fail() -> Any:
        raise MemoryError("no memory for a plan")

    monkeypatch.setattr(planners[rank]._planner, "create_local_plan", fail)

    def work(at: int) -> Any:
        """As the loop does: whoever fails says so, and whoever waits for it hears it."""
        keeper = ensemble.manager if at == 0 else ensemble.members[at - 1]
        try:
            keeper.save(states(3, 1)[at], request(1))
            return keeper.drain()
        except Exception as error:
            ensemble.councils[at].fail(f"rank {at}: {error}", 1)
            raise

    told = each([lambda at=at: work(at) for at in range(3)])  # type: ignore[misc]
    assert all(isinstance(one, Exception) for one in told), told
    assert isinstance(told[rank], MemoryError)
    assert CheckpointReader(tmp_path).steps() == []


@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_that_hangs_in_a_save_is_named_to_all_within_the_time_out(rank: int, tmp_path: Path) -> None:
    Ensemble(tmp_path, 3).save(states(3, 1), 1)
    ensemble = Ensemble(tmp_path, 3, attempt=2, timeout_secs=0.5)
    hanging = ensemble.members[rank - 1]

    def save(at: int) -> Any:
        keeper = ensemble.manager if at == 0 else ensemble.members[at - 1]
        if keeper is hanging:
            hanging._background.beside = False
            hanging._serve = lambda job: None  # type: ignore[assignment, return-value]  # never answers
        keeper.save(states(3, 2)[at], request(2))
        return None if keeper is hanging else keeper.drain()

    told = each([lambda at=at: save(at) for at in range(3)])  # type: ignore[misc]
    others = [told[at] for at in range(3) if at != rank]
    assert all(isinstance(one, LostRankError) for one in others), told
    assert {str(one) for one in others} == {f"rank {rank} did not answer within 0.5 s (runtime.timeout_secs)"}
    assert CheckpointReader(tmp_path).steps() == [1]


def test_ranks_that_wait_for_one_that_is_gone_give_up_when_they_are_told(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 2, timeout_secs=60)
    division = ensemble.leader._division
    told = each([lambda: division.divide(tensors()), lambda: ensemble.councils[0].stop("rank 1 is lost")])
    assert isinstance(told[0], LostRankError)
    assert str(told[0]) == "rank 1 is lost"


def test_damage_makes_all_ranks_load_the_next_older_one(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 2)
    for step in (1, 2):
        ensemble.save(states(2, step), step)
    path = tmp_path / "packs" / "step-000000002.a001.r00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    fresh = states(2)
    told = Ensemble(tmp_path, 2, attempt=2).restore(fresh)
    assert [one.manifest.step for one in told] == [1, 1]
    assert [one.quarantined for one in told] == [(2,), (2,)]
    for state in fresh:
        assert_same(state, 1)


def test_a_state_that_does_not_fit_on_one_rank_is_refused_by_all(tmp_path: Path) -> None:
    Ensemble(tmp_path, 2).save(states(2, 1), 1)
    fresh = states(2)
    fresh[1].tensors["student.more"] = torch.zeros(3)
    told = Ensemble(tmp_path, 2, attempt=2).restore(fresh)
    assert all(isinstance(one, CheckpointError) and "student.more" in str(one) for one in told), told


def test_without_a_checkpoint_all_ranks_hear_so(tmp_path: Path) -> None:
    told = Ensemble(tmp_path, 2).restore(states(2))
    assert all(isinstance(one, NoCheckpointError) for one in told), told


def test_plans_follow_when_moments_appear(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 2)
    ensemble.save(states(2, 1), 1)
    grown = states(2, 2)
    for state in grown:
        state.tensors["optimizer.block0.exp_avg"] = torch.ones(20, 16)
    assert [one.step for one in ensemble.save(grown, 2)] == [2, 2]
    assert "optimizer.block0.exp_avg" in CheckpointReader(tmp_path).manifest(2).tensors


def test_what_was_said_is_forgotten_two_saves_later(tmp_path: Path) -> None:
    ensemble = Ensemble(tmp_path, 2)
    sizes = []
    for step in range(1, 7):
        ensemble.save(states(2, step), step)
        sizes.append(ensemble.store.num_keys())
    assert sizes[-1] == sizes[-2]


def test_the_heaviest_go_first_to_whoever_has_least() -> None:
    plans = []
    planners = [SharePlanner(3) for _ in range(3)]
    for planner in planners:
        planner.set_up_planner(tensors(), None, False)
        plans.append(planner.create_local_plan())
    assert plans[0].items == plans[1].items
    finished, _ = planners[0].create_global_plan(plans)
    written = [(item.index.fqn, tuple(item.index.offset or ())) for plan in finished for item in plan.items]
    assert len(written) == len(set(written)) == len(plans[0].items)


class Deaf(OneWriter):
    """The others cannot be told any more how a save ended."""

    def end_save(self, *_: object) -> None:
        raise LostRankError("the rendezvous of the ranks is gone")


def test_what_went_wrong_with_a_save_is_not_hidden_by_ranks_that_cannot_be_told(tmp_path: Path) -> None:
    files = AtWork("sync", no_space)
    policy, keep = AnyOf(()), KeepAny((LatestN(1),))
    manager = CheckpointManager(tmp_path, save=policy, keep=keep, writers=Deaf(), files=files)
    manager.save(PartState(tensors(1), 1), request(1))
    with pytest.raises(SaveFailedError, match="No space left on device"):
        manager.drain()
