"""A data set is fetched by one process, while the others wait, and by none where nobody asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from config_examples import config
from support.cifar_files import SMALL10, archive_bytes, server, write_archive
from support.runs import Lab

from dino_exp.build import Preparation, build_data
from dino_exp.config.image_sections import AnyDataConfig
from dino_exp.data.cifar import Cifar, load_cifar
from dino_exp.errors import ConfigError

DATA = archive_bytes(SMALL10)


def settings(root: Path, *words: str) -> AnyDataConfig:
    return config("data=cifar10", "augment=dino", f"data.root={root}", *words).data


def published_at(address: str) -> Cifar:
    return replace(SMALL10, address=f"{address}/{SMALL10.archive}", md5=hashlib.md5(DATA).hexdigest())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests to the server that has the small collection, in the place of the published one."""
    with server(DATA) as http:
        monkeypatch.setattr("dino_exp.build.cifar.COLLECTIONS", {"cifar10": published_at(http.address)})
        yield http.asked


def test_it_is_fetched_when_asked_and_only_then(asked: list[str], tmp_path: Path) -> None:
    how = Preparation(cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.download=true"):
        build_data(settings(tmp_path), how)
    looking = replace(how, looks_only=True, root_key="root")
    with pytest.raises(ConfigError, match="is not in root="):
        build_data(settings(tmp_path, "data.download=true"), looking)
    assert asked == []
    for _ in range(2):
        build_data(settings(tmp_path, "data.download=true"), how)
    assert len(asked) == 1
    assert len(build_data(settings(tmp_path), how).val) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == [SMALL10.archive]


def test_progress_is_told_and_may_stop_it_and_nothing_is_left(asked: list[str], tmp_path: Path) -> None:
    told: list[str] = []

    def tell(word: str, done: int, total: int | None) -> None:
        told.append(word)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_data(settings(tmp_path, "data.download=true"), Preparation(cache=tmp_path / "cache", progress=tell))
    assert told == ["fetching CIFAR-10, MB"]
    assert list(tmp_path.iterdir()) == []


def test_of_several_ranks_the_first_fetches_and_all_see_the_same(tmp_path: Path) -> None:
    with server(DATA) as http:
        told = Lab(tmp_path).call_together(3, "fetched_together", http.address, str(tmp_path / "data"))
        assert len(http.asked) == 1
    expected = load_cifar(write_archive(SMALL10, tmp_path / "own"), tmp_path / "own")[0].fingerprint()
    assert told == {"fingerprints": [expected] * 3}
