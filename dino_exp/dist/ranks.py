"""The collectives of training: sums and gathers over ranks, exact in the order of the ranks where that matters.

Every rank must call the same ones in the same order. A rank that is lost shows as an error of whichever comes next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor

from dino_exp.dist.council import Council, LostRankError, OtherRankError, Statement
from dino_exp.dist.place import ALONE, Place
from dino_exp.dist.store import PatientStore, Store
from dino_exp.errors import ConfigError, DinoExpError

T = TypeVar("T")

_PARTING_SECS = 5.0  # how long a rank that fails waits for the others before it decides without them


class Ranks(Protocol):
    """What a training asks of the processes that carry it out; one process is enough."""

    @property
    def place(self) -> Place:
        """Which of them this is."""

    def add_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of equal shape, in the order of the ranks: (size, ...)."""

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks one after the other along `dim`, where their sizes may differ."""

    def from_first(self, value: T) -> T:
        """What rank 0 gives."""

    def in_turn(self, work: Callable[[Callable[[], None]], T], meanwhile: Callable[[], None]) -> T:
        """What `work` gives here: rank 0 does it first, then the others, and nobody goes on before all are done.

        `work` calls what it is given now and then, as a sign of life; whoever waits calls `meanwhile`, which may raise.
        """

    def all_well(self, error: Exception | None) -> None:
        """Raise `error` here, and an OtherRankError on the other ranks, if any rank has one."""

    def part(self, error: Exception, keeps: int | None) -> Parting:
        """Agree on why training ends by an error, and whether the state of a step may still be saved."""


@dataclass(frozen=True)
class Parting:
    """The error to end with, and whether all ranks could still save the state of one step."""

    error: Exception
    may_save: bool


class OneRank:
    """A process that trains alone."""

    place = ALONE

    def add_(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """(1, ...)."""
        return tensor[None]

    def gather(self, tensor: Tensor, dim: int) -> Tensor:  # noqa: ARG002
        """The tensor itself."""
        return tensor

    def from_first(self, value: T) -> T:
        """The value itself."""
        return value

    def in_turn(self, work: Callable[[Callable[[], None]], T], meanwhile: Callable[[], None]) -> T:  # noqa: ARG002
        """Nobody waits."""
        return work(lambda: None)

    def all_well(self, error: Exception | None) -> None:
        """Raise the error, if there is one."""
        if error is not None:
            raise error

    def part(self, error: Exception, keeps: int | None) -> Parting:
        """The error itself."""
        return Parting(error, keeps is not None)


ONE_RANK = OneRank()


class ManyRanks:
    """One of several processes, after `joined` has brought them together.

    CPU tensors travel through gloo, those on a CUDA device through NCCL.
    """

    def __init__(self, place: Place, council: Council, store: Any = None) -> None:
        self.place, self.council = place, council
        self._store, self._num_talks = store, 0

    def connect(self) -> Council:
        """The same rank's end of the talk on a connection of its own, for another thread."""
        return self.council.connect(_new_connection(self._store, self.council.session, self.council.timeout_secs))

    def add_(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place; the same bits on each."""
        with _losses_named():
            torch.distributed.all_reduce(tensor)
        return tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of equal shape, in the order of the ranks: (size, ...)."""
        stacked = tensor.new_empty((self.place.size, *tensor.shape))
        with _losses_named():
            torch.distributed.all_gather(list(stacked.unbind()), tensor.contiguous())
        return stacked

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks one after the other along `dim`, where their sizes may differ."""
        rows = tensor.movedim(dim, 0)
        sizes: list[int] = self.stack(torch.tensor(len(rows))).tolist()
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.stack(padded)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole.movedim(0, dim)

    def from_first(self, value: T) -> T:
        """What rank 0 gives. Raises LostRankError, OtherRankError."""
        self._num_talks += 1
        return self.council.from_first(f"talk/{self._num_talks}", value)  # type: ignore[no-any-return]

    def in_turn(self, work: Callable[[Callable[[], None]], T], meanwhile: Callable[[], None]) -> T:
        """What `work` gives here: rank 0 does it first, then the others, and nobody goes on before all are done.

        However long it takes: others wait as long as there are signs of life. Raises LostRankError, OtherRankError.
        """
        self._num_talks += 1
        topic = f"turn/{self._num_talks}"
        if not self.place.is_first:
            self.council.take(f"{topic}/0", of=0, meanwhile=meanwhile)
        done = work(self.council.give_sign)
        self.council.gather(topic, None, meanwhile=meanwhile)
        return done

    def all_well(self, error: Exception | None) -> None:
        """Raise `error` here, and an OtherRankError on the other ranks, if any rank has one."""
        troubled = self.add_(torch.tensor(0.0 if error is None else 1.0))
        if not troubled.item():
            return
        self._num_talks += 1
        mine = None if error is None else (f"rank {self.place.rank}: {_full_text(error)}", _exit_code(error))
        told = self.council.gather(f"trouble/{self._num_talks}", mine)
        if error is not None:
            raise error
        text, code = next(one for one in told if one is not None)
        raise OtherRankError(text, code)

    def part(self, error: Exception, keeps: int | None) -> Parting:
        """Agree with the ranks that are left: the same reason on each, and one decision.

        A rank that only missed others ends with the error of the rank that was the cause.
        """
        is_cause = not is_of_a_lost_rank(error)
        mine = Statement(
            rank=self.place.rank, text=_full_text(error), exit_code=_exit_code(error), is_cause=is_cause, keeps=keeps
        )
        try:
            verdict = self.council.settle(mine, secs=min(self.council.timeout_secs / 2, _PARTING_SECS))
        except LostRankError as problem:
            self.council.stop(str(problem))
            return Parting(error, may_save=False)
        if verdict.keeps is None:
            self.council.stop(verdict.text)
        own = error if is_cause else OtherRankError(verdict.text, verdict.exit_code)
        return Parting(own, may_save=verdict.keeps is not None)


@contextlib.contextmanager
def joined(place: Place, device: torch.device, timeout_secs: float) -> Iterator[ManyRanks]:
    """Meet the other processes where the launcher says (MASTER_ADDR, MASTER_PORT), and part from them at the end.

    Raises LostRankError where they do not come within `timeout_secs`.
    """
    time_limit = timedelta(seconds=timeout_secs)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _losses_named():
        store = _rendezvous(place, time_limit)
        torch.distributed.init_process_group(
            backend, store=store, rank=place.rank, world_size=place.size, timeout=time_limit
        )
    council: Council | None = None
    try:
        session = _new_session()
        council = Council(_new_connection(store, session, timeout_secs), place, timeout_secs=timeout_secs, session=session)
        council.introduce()
        yield ManyRanks(place, council, store)
    except BaseException as error:
        if council is not None:
            council.fail(_full_text(error), _exit_code(error))
        if device.type == "cpu":  # of a broken group NCCL would wait for ranks that are not there any more
            torch.distributed.destroy_process_group()
        raise
    else:
        torch.distributed.destroy_process_group()
    finally:
        if council is not None:
            council.leave(min(timeout_secs / 2, _PARTING_SECS), keeps_store=_keeps_store(place))


def _rendezvous(place: Place, time_limit: timedelta) -> Any:
    """The store where the launcher says (MASTER_ADDR, MASTER_PORT). Under torchrun its agent keeps it."""
    meet: Any = torch.distributed.rendezvous  # type: ignore[attr-defined]
    try:
        store, _, _ = next(meet("env://", place.rank, place.size, timeout=time_limit))
    except ValueError as problem:  # MASTER_ADDR or MASTER_PORT is not there, or no number
        raise ConfigError(
            f"rank {place.rank} of {place.size} does not know where to meet the others: {problem}; start the processes "
            "with torchrun"
        ) from problem
    # The agent may keep it over a restart, and then it still knows the addresses of those who are gone.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.distributed_c10d.PrefixStore(f"dino_exp/restart_{restart}", store)


def _keeps_store(place: Place) -> bool:
    """Whether the store goes when this process does: where no agent keeps it, rank 0 does."""
    return place.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _new_session() -> str:
    """A word that these processes have in common, and no others, whatever the store still knows."""
    row = torch.tensor([secrets.randbits(62)])
    with _losses_named():
        torch.distributed.broadcast(row, src=0)
    return f"session_{row.item()}"


def _new_connection(store: Any, session: str, timeout_secs: float) -> Store:
    connection: Any = torch.distributed.distributed_c10d.PrefixStore(session, store.clone())
    return PatientStore(connection, timeout_secs)


@contextlib.contextmanager
def _losses_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        raise LostRankError(f"the other ranks cannot be reached: {_first_line(problem)}") from problem


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error says no more than that another rank was missed: in a collective of ours or of torch's."""
    if isinstance(error, (LostRankError, OtherRankError, torch.distributed.DistError)):
        return True
    # Collectives within autograd and FSDP raise plain RuntimeErrors, which only gloo's own words tell from others.
    return type(error) is RuntimeError and "gloo" in str(error)


def _exit_code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, DinoExpError) else 1


def _full_text(error: BaseException) -> str:
    return str(error) if isinstance(error, DinoExpError) else f"{type(error).__name__}: {error}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
