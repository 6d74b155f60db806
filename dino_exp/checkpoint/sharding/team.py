"""The processes that write a checkpoint together: the first leads, the others carry out its orders.

A save is a talk over the council: an order of the leader, an answer of each member, and so on to its end. Whoever does
not answer is named; then nothing is committed, and all who are left hear the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from dino_exp.checkpoint.layout import PackName
from dino_exp.checkpoint.manifest import Manifest
from dino_exp.checkpoint.pieces import Piece
from dino_exp.checkpoint.restoring import Restored, check_fit
from dino_exp.checkpoint.rewriting import check_content
from dino_exp.checkpoint.sharding.messages import CheckOrder, Commit, End, LoadOrder, Trouble, WriteOrder, trouble_of
from dino_exp.checkpoint.sharding.planning import SharePlanner, labelled, layout_of, part_of
from dino_exp.checkpoint.sharding.reading import load_parts
from dino_exp.checkpoint.store import Store
from dino_exp.checkpoint.types import ShardedStateful, Stateful
from dino_exp.checkpoint.verify import check_packs
from dino_exp.checkpoint.writers import SaveJob, write_own_share
from dino_exp.checkpoint.writing import describe
from dino_exp.dist.council import Council
from dino_exp.errors import CheckpointError


class Division:
    """Which part of a state each process writes: planned anew, together, when the state has other tensors."""

    def __init__(self, council: Council) -> None:
        self._council, self._place = council, council.place
        self._num_plans = 0
        self._layout: tuple[Any, ...] = ()
        self._planner = SharePlanner(self._place.size)

    def divide(self, tensors: Mapping[str, Tensor]) -> dict[Piece, Tensor]:
        """Live tensors of this process, or rows of them. Raises LostRankError."""
        layout = layout_of(tensors)
        self._planner.set_up_planner(dict(tensors), None, self._place.is_first)
        if layout != self._layout:
            self._plan()
            self._layout = layout
        return labelled([part_of(self._planner, item) for item in self._planner.plan.items])

    def _plan(self) -> None:
        self._num_plans += 1
        topic, rank, size = f"plan/{self._num_plans}", self._place.rank, self._place.size
        own = self._planner.create_local_plan()
        if self._place.is_first:
            others = [self._council.take(f"{topic}/from/{other}", of=other) for other in range(1, size)]
            plans, _ = self._planner.create_global_plan([own, *others])
            for other in range(1, size):
                self._council.post(f"{topic}/for/{other}", plans[other])
            self._planner.finish_plan(plans[0])
        else:
            self._council.post(f"{topic}/from/{rank}", own)
            self._planner.finish_plan(self._council.take(f"{topic}/for/{rank}", of=0))


class Talk:
    """Orders and answers of one save or one restore after the other, numbered alike in all processes."""

    def __init__(self, council: Council, topic: str) -> None:
        self._council, self._topic = council, topic
        self._number, self._num_orders = 0, 0
        self._posted: list[list[str]] = [[]]

    def begin(self) -> None:
        """The next save or restore. What was said in the one before the last has been heard by all."""
        self._number, self._num_orders = self._number + 1, 0
        self._posted.append([])
        if len(self._posted) > 2:
            self._council.forget(self._posted.pop(0))

    def order(self, order: Any, own: Callable[[], Any]) -> list[Any]:
        """Have all carry out an order, this process by `own`; their answers by rank.

        Raises the error of the lowest rank that had one, once all have answered, or LostRankError.
        """
        key = self._next_key()
        self._say(key, order)
        answers = [_answer(own)]
        answers += [self._council.take(f"{key}/{rank}", of=rank) for rank in range(1, self._council.place.size)]
        for rank, answer in enumerate(answers):
            if isinstance(answer, Trouble):
                raise answer.error(rank)
        return answers

    def end(self, end: End) -> None:
        """Tell that no order follows."""
        self._say(self._next_key(), end)

    def follow(self, carry_out: Callable[[Any], Any]) -> End:
        """Carry out what the leader orders, to the end. Raises LostRankError."""
        longest = 2 * self._council.timeout_secs + 10  # the leader waits for others, and says who is lost
        while True:
            key = self._next_key()
            order = self._council.take(key, of=0, secs=longest)
            if isinstance(order, End):
                return order
            self._say(f"{key}/{self._council.place.rank}", _answer(partial(carry_out, order)))

    def _next_key(self) -> str:
        self._num_orders += 1
        return f"{self._topic}/{self._number}/{self._num_orders}"

    def _say(self, key: str, value: Any) -> None:
        self._posted[-1].append(key)
        self._council.post(key, value)


def _answer(work: Callable[[], Any]) -> Any:
    """What the work gives, or what went wrong with it."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 (handed to the leader, which raises it)
        return trouble_of(error)


class Leader:
    """The process that commits; `Member` is what the others have.

    `council` is used by the thread that trains, `side` by the one that writes.
    """

    def __init__(self, council: Council, side: Council) -> None:
        self.num = council.place.size
        self._division = Division(council)
        self._saves, self._loads = Talk(side, "save"), Talk(council, "load")
        self._save_is_open = self._load_is_open = False

    def divide(self, tensors: Mapping[str, Tensor]) -> dict[Piece, Tensor]:
        """What this process writes of a state. Raises LostRankError."""
        return self._division.divide(tensors)

    def write(self, job: SaveJob, store: Store, base: Manifest | None) -> Manifest:
        """A pack by each process, described in one manifest."""
        self._open_save()
        order = WriteOrder(storage=job.by.storage, base=base)
        shares = self._saves.order(order, lambda: write_own_share(job, store, base, rank=0))
        return describe(shares, job.values, job.request, job.by, base)

    def check(self, manifest: Manifest, store: Store) -> None:
        """Each process reads back its pack, this one also what they build on."""
        theirs = [str(PackName(manifest.step, manifest.attempt, rank)) for rank in range(1, self.num)]

        def check_own() -> None:
            check_packs(manifest, store, elsewhere=theirs)
            check_content(manifest, store, packs={str(PackName(manifest.step, manifest.attempt, 0))})

        self._open_save()
        self._saves.order(CheckOrder(manifest=manifest), check_own)

    def end_save(self, problem: BaseException | None, manifest: Manifest | None, latest_step: int | None) -> None:
        """Tell the members how the save ended, and what is on disk now."""
        self._open_save()
        self._save_is_open = False
        committed = None if manifest is None else Commit(manifest.step, manifest.reasons)
        trouble = None if problem is None else trouble_of(problem)
        self._saves.end(End(trouble=trouble, committed=committed, latest_step=latest_step))

    def load(self, state: Stateful, manifest: Manifest, store: Store, optional: tuple[str, ...]) -> None:
        """Every process loads its part. Raises CheckpointError if one of them does not fit."""
        self._open_load()
        order = LoadOrder(manifest=manifest, folder=str(store.folder.resolve()))
        self._loads.order(order, lambda: load_own_part(state, manifest, store, optional))

    def end_load(self, problem: BaseException | None, restored: Restored | None) -> None:
        """Tell the members what was loaded."""
        self._open_load()
        self._load_is_open = False
        self._loads.end(End(trouble=None if problem is None else trouble_of(problem), restored=restored))

    def _open_save(self) -> None:
        if not self._save_is_open:
            self._save_is_open = True
            self._saves.begin()

    def _open_load(self) -> None:
        if not self._load_is_open:
            self._load_is_open = True
            self._loads.begin()


def load_own_part(state: Stateful, manifest: Manifest, store: Store, optional: tuple[str, ...]) -> None:
    """Load what this process holds of a state. Raises CheckpointError, CorruptCheckpointError, OSError."""
    if not isinstance(state, ShardedStateful):
        raise CheckpointError(f"{type(state).__name__} cannot be loaded in parts: it has no load_parts")
    check_fit(manifest, state.state_dict(), optional)
    state.load_parts(manifest.tensors, manifest.state, lambda targets: load_parts(targets, manifest, store))
