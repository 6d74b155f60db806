"""A data set is fetched by one process, while the others wait, and by none where nobody asked."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from config_examples import config
from support.cifar_files import SMALL10, archive_bytes, server, write_archive
from support.runs import Lab

from dino_exp import build
from dino_exp.attempts import obtaining
from dino_exp.attempts.obtaining import StoppedFetchingError, fetch_data
from dino_exp.config.image_sections import AnyDataConfig
from dino_exp.data.cifar import Cifar, load_cifar
from dino_exp.dist.ranks import ONE_RANK
from dino_exp.errors import ConfigError
from dino_exp.runs.signals import SignalFlags

DATA = archive_bytes(SMALL10)


def settings(root: Path, *words: str) -> AnyDataConfig:
    return config("data=cifar10", f"data.root={root}", *words).data


def published_at(address: str) -> Cifar:
    return replace(SMALL10, address=f"{address}/{SMALL10.archive}", md5=hashlib.md5(DATA).hexdigest())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests to the server that has the small collection, in the place of the published one."""
    with server(DATA) as http:
        monkeypatch.setattr("dino_exp.build.images.COLLECTIONS", {"cifar10": published_at(http.address)})
        yield http.asked


def test_it_is_fetched_when_asked_and_only_then(asked: list[str], tmp_path: Path) -> None:
    beats: list[int] = []
    signs = {"beat": lambda: beats.append(1), "signals": SignalFlags()}
    fetch_data(settings(tmp_path), ONE_RANK, **signs)
    assert asked == []
    with pytest.raises(ConfigError, match=r"data\.download=true"):
        build.build_data(settings(tmp_path))
    for _ in range(2):
        fetch_data(settings(tmp_path, "data.download=true"), ONE_RANK, **signs)
    assert len(asked) == 1
    assert len(build.build_data(settings(tmp_path)).val) == 50


def test_the_lock_is_shown_to_be_held_meanwhile(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obtaining, "_SIGN_SECS", 0.0)
    beats: list[int] = []
    fetch_data(settings(tmp_path, "data.download=true"), ONE_RANK, beat=lambda: beats.append(1), signals=SignalFlags())
    assert beats


def test_a_signal_stops_it_and_nothing_is_left(asked: list[str], tmp_path: Path) -> None:
    flags = SignalFlags()
    flags.stop_signal = signal.SIGTERM
    with pytest.raises(StoppedFetchingError) as caught:
        fetch_data(settings(tmp_path, "data.download=true"), ONE_RANK, beat=lambda: None, signals=flags)
    assert caught.value.exit_code == 143
    assert list(tmp_path.iterdir()) == []


def test_of_several_ranks_the_first_fetches_and_all_see_the_same(tmp_path: Path) -> None:
    with server(DATA) as http:
        told = Lab(tmp_path).call_together(3, "fetched_together", http.address, str(tmp_path / "data"))
        assert len(http.asked) == 1
    cifar = write_archive(SMALL10, tmp_path / "own")
    expected = load_cifar(cifar, tmp_path / "own")[0].fingerprint()
    assert told == {"fingerprints": [expected] * 3}
