"""A store that stops answering: whoever asks is told within the time-out, and at once after that."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from dino_exp.dist.store import PatientStore


class CutOff(HashStore):
    """Answers until the cable is pulled."""

    def __init__(self) -> None:
        super().__init__()
        self.pulled, self.put_back = threading.Event(), threading.Event()

    def check(self, keys: list[str], /) -> bool:
        if self.pulled.is_set():
            self.put_back.wait()
        return super().check(keys)


def test_what_answers_is_handed_through() -> None:
    store = PatientStore(HashStore(), 60.0)
    assert not store.check(["a"])
    store.set("a", b"1")
    assert (store.check(["a"]), store.get("a")) == (True, b"1")
    assert store.compare_set("b", "", b"2") == b"2"
    assert store.compare_set("b", "", b"3") == b"2"
    assert store.delete_key("a")
    assert not store.check(["a"])


def test_its_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="missing"):
        PatientStore(Failing(), 60.0).get("missing")


class Failing(HashStore):
    def get(self, key: str, /) -> bytes:
        raise RuntimeError(f"no {key}")


def test_silence_ends() -> None:
    inner = CutOff()
    store = PatientStore(inner, 0.2)
    assert not store.check(["a"])
    inner.pulled.set()
    try:
        with pytest.raises(RuntimeError, match=r"did not answer within 0.2 s \(runtime.timeout_secs\)"):
            store.check(["a"])
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="did not answer"):
            store.get("a")
        assert time.monotonic() - started < 0.1, "it is not asked again"
    finally:
        inner.put_back.set()
