"""The store of a rendezvous, with an end to its silence.

torch's own waits for the answer to most calls as long as the connection lives, and where a host dies or is cut off
nobody closes it: that takes the kernel a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from dino_exp.waiting import within

T = TypeVar("T")


class Store(Protocol):
    """The part of torch's `Store` that is used."""

    def set(self, key: str, value: bytes, /) -> None: ...  # noqa: D102
    def get(self, key: str, /) -> bytes: ...  # noqa: D102
    def check(self, keys: list[str], /) -> bool: ...  # noqa: D102
    def compare_set(self, key: str, expected: str, desired: bytes, /) -> bytes: ...  # noqa: D102
    def delete_key(self, key: str, /) -> bool: ...  # noqa: D102


class PatientStore:
    """Another store, each call of which is answered within `secs` or raises RuntimeError, as all later ones then do."""

    def __init__(self, store: Store, secs: float) -> None:
        self._store, self._secs, self._is_silent = store, secs, False

    def set(self, key: str, value: bytes, /) -> None:
        """Say something under a key."""
        self._answered(lambda: self._store.set(key, value))

    def get(self, key: str, /) -> bytes:
        """What is said under a key."""
        return self._answered(lambda: self._store.get(key))

    def check(self, keys: list[str], /) -> bool:
        """Whether something is said under each of the keys."""
        return self._answered(lambda: self._store.check(keys))

    def compare_set(self, key: str, expected: str, desired: bytes, /) -> bytes:
        """Say `desired` where `expected` is said, or nothing and it is empty; what is said then."""
        return self._answered(lambda: self._store.compare_set(key, expected, desired))

    def delete_key(self, key: str, /) -> bool:
        """Forget a key; whether it was there."""
        return self._answered(lambda: self._store.delete_key(key))

    def _answered(self, call: Callable[[], T]) -> T:
        if not self._is_silent:
            try:
                return within(self._secs, call)
            except TimeoutError:
                self._is_silent = True
        raise RuntimeError(f"its store did not answer within {self._secs:g} s (runtime.timeout_secs)")
