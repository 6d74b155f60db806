"""The ranks of one training as threads of one process, with the store that they talk through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore

from dino_exp.checkpoint.manager import CheckpointManager
from dino_exp.checkpoint.sharding.member import Member
from dino_exp.checkpoint.sharding.team import Leader
from dino_exp.checkpoint.storage import Storage
from dino_exp.dist.council import Council
from dino_exp.dist.place import Place
from dino_exp.fsio import LOCAL, Files
from support.checkpoints import KEEP, SAVE, request


class PartState:
    """Named tensors and a number, which takes parts of them as well as the whole."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], value: int = 0) -> None:
        self.tensors, self.value = dict(tensors), value

    def state_dict(self) -> dict[str, Any]:
        return {**self.tensors, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])
        self.value = state["value"]

    def load_parts(
        self, names: Collection[str], values: Mapping[str, Any], fill: Callable[[Mapping[str, Any]], None]
    ) -> None:
        fill({name: self.tensors[name] for name in names})
        self.value = values["value"]


def each(works: Sequence[Callable[[], Any]], secs: float = 60) -> list[Any]:
    """What each of these gives, or the error that it raises; all at once, each in a thread of its own."""
    results: list[Any] = [None] * len(works)

    def run(rank: int) -> None:
        try:
            results[rank] = works[rank]()
        except BaseException as error:  # noqa: BLE001 (looked at by the test)
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(secs)
        assert not thread.is_alive(), "a rank hangs"
    return results


class Ensemble:
    """A manager and its members, as many as ranks, each with files of its own."""

    def __init__(
        self,
        folder: Path,
        size: int,
        *,
        codec: str = "raw",
        attempt: int = 1,
        timeout_secs: float = 20,
        files: Mapping[int, Files] | None = None,
        require_finite: bool = False,
        background: bool = True,
        **options: Any,
    ) -> None:
        self.size, self.store = size, HashStore()
        places = [Place(rank=rank, size=size) for rank in range(size)]
        self.councils = [Council(self.store, place, timeout_secs=timeout_secs) for place in places]
        sides = [council.connect(self.store) for council in self.councils]
        self.leader = Leader(self.councils[0], sides[0])
        own = files or {}
        storage = Storage(codec=codec, companions={"teacher.": "student."})
        self.manager = CheckpointManager(
            folder,
            save=SAVE,
            writers=self.leader,
            attempt=attempt,
            storage=storage,
            files=own.get(0, LOCAL),
            require_finite=require_finite,
            background=background,
            **{"keep": KEEP, **options},
        )
        self.members = [
            Member(
                folder, self.councils[rank], sides[rank], save=SAVE, attempt=attempt, files=own.get(rank, LOCAL),
                require_finite=require_finite, background=background,
            )
            for rank in range(1, size)
        ]  # fmt: skip

    def save(self, states: Sequence[Any], step: int) -> list[Any]:
        """All ranks save; what each heard of it, or its error."""

        def work(rank: int) -> Any:
            keeper = self.manager if rank == 0 else self.members[rank - 1]
            keeper.save(states[rank], request(step))
            return keeper.drain()

        return each([lambda rank=rank: work(rank) for rank in range(self.size)])  # type: ignore[misc]

    def restore(self, states: Sequence[Any]) -> list[Any]:
        """All ranks load the newest good one; what each heard of it, or its error."""

        def work(rank: int) -> Any:
            return self.manager.restore(states[0]) if rank == 0 else self.members[rank - 1].restore(states[rank])

        return each([lambda rank=rank: work(rank) for rank in range(self.size)])  # type: ignore[misc]
