"""What ranks tell each other outside the collectives of training: decisions, parts of a checkpoint, and failures.

It goes through the store of the rendezvous, because a process group is of no use any more once one of its ranks is
lost: here a rank waits for one other rank at a time, knows which one does not answer, and can still speak to the rest.
Values are pickled as torch's own object collectives do: they come from processes of the same job only.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from dino_exp.dist.place import Place
from dino_exp.dist.store import Store
from dino_exp.errors import TrainingError
from dino_exp.processes import ProcessId

_SHORTEST_SECS, _LONGEST_SECS = 0.001, 0.05  # between two looks
_ALIVE_SECS = 0.5  # between two looks at the process that is waited for
_SIGN_SECS = 5.0  # between two signs of life at least


class OtherRankError(TrainingError):
    """Another rank failed; this one ends with its error and its exit code."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class LostRankError(TrainingError):
    """A rank has gone, or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a rank says when its training ends by an error.

    `is_cause`: it failed by itself, and not because it missed another rank. `keeps`: the step whose state it could
    still save; None where there is none.
    """

    rank: int
    text: str
    exit_code: int
    is_cause: bool
    keeps: int | None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks make of their statements, the same on each: why it ended, and whether they may still save."""

    text: str
    exit_code: int
    cause: int | None
    keeps: int | None


class Council:
    """One rank's end of the talk. `connect` opens one more for another thread: a connection serves one wait at a time.

    Whoever waits hears at once of a process of this host that has ended, of another one after `timeout_secs` without a
    sign of life.
    """

    def __init__(
        self,
        store: Store,
        place: Place,
        *,
        timeout_secs: float,
        session: str = "",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.place, self.timeout_secs, self.session = place, timeout_secs, session
        self._store, self._clock, self._sleep = store, clock, sleep
        self._processes: dict[int, ProcessId] = {}
        self._stopped = threading.Event()  # shared by all connections of this rank
        self._why = ""
        self._parent: Council | None = None
        self._next_sign = 0.0
        self.heeds_failures = True

    def connect(self, store: Store) -> Council:
        """The same rank's end on another connection to the store, for work that the failure of a rank may outlast."""
        other = Council(
            store, self.place, timeout_secs=self.timeout_secs, session=self.session, clock=self._clock, sleep=self._sleep
        )
        other._processes, other._stopped, other._parent = self._processes, self._stopped, self
        other.heeds_failures = False
        return other

    def introduce(self) -> None:
        """Tell who this is, and learn who the others are. Raises LostRankError."""
        self.post(f"process/{self.place.rank}", ProcessId.of_this())
        for rank in range(self.place.size):
            if rank != self.place.rank:
                self._processes[rank] = self.take(f"process/{rank}", of=rank)

    def stop(self, why: str) -> None:
        """Whoever waits on any connection of this rank gives up, with a LostRankError that says `why`."""
        (self._parent or self)._why = why
        self._stopped.set()

    def post(self, key: str, value: Any) -> None:
        """Say something under a key that is used once. Raises LostRankError where the store is gone."""
        try:
            self._store.set(key, pickle.dumps(value))
        except RuntimeError as problem:
            raise self._gone(problem) from problem

    def take(
        self, key: str, *, of: int, secs: float | None = None, meanwhile: Callable[[], None] | None = None
    ) -> Any:
        """What rank `of` says under a key: waits for at most `secs`, or the time-out, since its last sign of life.

        `meanwhile` is called now and then, and may raise. Raises LostRankError.
        """
        return self._wait(key, of, self.timeout_secs if secs is None else secs, meanwhile)

    def give_sign(self) -> None:
        """Let whoever waits for this rank wait on: it still works. Call it often; a sign is given every few seconds.

        Raises OtherRankError where another rank has failed meanwhile, LostRankError.
        """
        now = self._clock()
        if now < self._next_sign:
            return
        self._next_sign = now + min(_SIGN_SECS, self.timeout_secs / 4)
        self.post(_sign_of(self.place.rank), now)
        for rank in range(self.place.size):
            if rank != self.place.rank:
                self._heed_failure(rank)

    def gather(self, topic: str, value: Any, *, meanwhile: Callable[[], None] | None = None) -> list[Any]:
        """What each rank says of a topic, in their order. Raises LostRankError."""
        self.post(f"{topic}/{self.place.rank}", value)
        others = {
            rank: self.take(f"{topic}/{rank}", of=rank, meanwhile=meanwhile)
            for rank in range(self.place.size)
            if rank != self.place.rank
        }
        return [value if rank == self.place.rank else others[rank] for rank in range(self.place.size)]

    def from_first(self, topic: str, value: Any = None, *, secs: float | None = None) -> Any:
        """What rank 0 says of a topic; `value` is that. Raises LostRankError."""
        if self.place.is_first:
            self.post(topic, value)
            return value
        return self.take(topic, of=0, secs=secs)

    def has(self, key: str) -> bool:
        """Whether something was said under a key. Raises LostRankError where the store is gone."""
        try:
            return self._store.check([key])
        except RuntimeError as problem:
            raise self._gone(problem) from problem

    def forget(self, keys: list[str]) -> None:
        """Let the store forget what this rank posted, once all have heard it."""
        for key in keys:
            try:
                self._store.delete_key(key)
            except RuntimeError:  # a store that does not delete, or is gone: nothing waits for it
                return

    def fail(self, text: str, exit_code: int) -> None:
        """Say that this rank ends by an error, so that whoever waits for it on a first connection ends as well."""
        key = _failure_of(self.place.rank)
        with contextlib.suppress(LostRankError):
            if not self.has(key):
                statement = Statement(rank=self.place.rank, text=text, exit_code=exit_code, is_cause=True, keeps=None)
                self.post(key, statement)

    def leave(self, secs: float, *, keeps_store: bool) -> None:
        """The last that a rank does: say that it has heard all it needs to.

        With `keeps_store` the store ends with this process, so it waits for the others, up to `secs` for those that
        live, or what it said last would never be heard.
        """
        with contextlib.suppress(LostRankError):  # the store is gone: nobody hears anything any more
            if not keeps_store:
                self.post(_left(self.place.rank), None)
                return
            end = self._clock() + secs
            others = [rank for rank in range(self.place.size) if rank != self.place.rank]
            while others and self._clock() < end:
                others = [rank for rank in others if not (self._is_gone(rank) or self.has(_left(rank)))]
                self._sleep(_LONGEST_SECS if others else 0)

    def settle(self, mine: Statement, *, secs: float) -> Verdict:
        """Hear within `secs` why the others end, and agree on one verdict. The first rank to know it fixes it for all.

        Raises LostRankError where the store is gone.
        """
        self.heeds_failures = False
        self.post(_failure_of(mine.rank), mine)
        end = self._clock() + secs
        stated, missing = {mine.rank: mine}, [rank for rank in range(self.place.size) if rank != mine.rank]
        pause = _SHORTEST_SECS
        while missing and self._clock() < end and not self.has(_VERDICT):
            for rank in [rank for rank in missing if self.has(_failure_of(rank))]:
                stated[rank] = self.take(_failure_of(rank), of=rank)
                missing.remove(rank)
            if any(self._is_gone(rank) for rank in missing):
                break
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_SECS)
        verdict = _judge(stated, [self._name(rank) for rank in missing])
        try:
            fixed = self._store.compare_set(_VERDICT, "", pickle.dumps(verdict))
        except RuntimeError:
            return verdict
        return pickle.loads(fixed)  # type: ignore[no-any-return]  # noqa: S301 (from a rank of this job)

    def _wait(self, key: str, rank: int, secs: float, meanwhile: Callable[[], None] | None) -> Any:
        between_looks = min(_ALIVE_SECS, secs / 8)
        end, pause, next_look = self._clock() + secs, _SHORTEST_SECS, self._clock() + between_looks
        signs: list[Any] = []
        while not self.has(key):
            now = self._clock()
            if self._stopped.is_set():
                raise LostRankError((self._parent or self)._why)
            if now > next_look:
                next_look = now + between_looks
                self._heed_failure(rank)
                if self._is_gone(rank) and not self.has(key):
                    raise LostRankError(f"{self._name(rank)} has ended")
                signs = [*signs[-1:], self._last_sign(rank)]
                if signs[0] != signs[-1]:
                    end = now + secs
                if meanwhile is not None:
                    meanwhile()
            if now > end:
                raise LostRankError(f"{self._name(rank)} did not answer within {secs:g} s (runtime.timeout_secs)")
            self._sleep(pause)
            pause = min(2 * pause, _LONGEST_SECS)
        try:
            return pickle.loads(self._store.get(key))  # noqa: S301 (from a rank of this job)
        except RuntimeError as problem:
            raise self._gone(problem) from problem

    def _last_sign(self, rank: int) -> bytes | None:
        key = _sign_of(rank)
        return self._store.get(key) if self.has(key) else None

    def _heed_failure(self, rank: int) -> None:
        if self.heeds_failures and self.has(_failure_of(rank)):
            statement: Statement = pickle.loads(self._store.get(_failure_of(rank)))  # noqa: S301 (of this job)
            raise OtherRankError(statement.text, statement.exit_code)

    def _is_gone(self, rank: int) -> bool:
        process = self._processes.get(rank)
        return process is not None and process.is_surely_gone()

    def _name(self, rank: int) -> str:
        process = self._processes.get(rank)
        return f"rank {rank}" if process is None else f"rank {rank} ({process})"

    def _gone(self, problem: RuntimeError) -> LostRankError:
        return LostRankError(f"the rendezvous of the ranks is gone: {str(problem).splitlines()[0]}")


_VERDICT = "failure/verdict"


def _sign_of(rank: int) -> str:
    return f"sign/{rank}"


def _left(rank: int) -> str:
    return f"left/{rank}"


def _failure_of(rank: int) -> str:
    return f"failure/{rank}"


def _judge(stated: dict[int, Statement], missing: list[str]) -> Verdict:
    """One verdict from what was stated: the lowest rank that failed by itself is the cause, else whoever is missing."""
    causes = [statement for _, statement in sorted(stated.items()) if statement.is_cause]
    first = causes[0] if causes else min(stated.values(), key=lambda statement: statement.rank)
    text = first.text if first.text.startswith("rank ") else f"rank {first.rank}: {first.text}"
    if not causes and missing:
        text = f"{' and '.join(missing)} ended or did not answer"
    steps = {statement.keeps for statement in stated.values()}
    keeps = steps.pop() if len(steps) == 1 and not missing else None
    return Verdict(
        text=text, exit_code=first.exit_code if causes else 1, cause=first.rank if causes else None, keeps=keeps
    )
