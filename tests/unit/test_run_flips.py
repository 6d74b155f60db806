"""One changed bit in every byte of the small files of a finished run: noticed or harmless, never a wrong load.

Manifests, packs and the registry have theirs in `test_checkpoint_flips`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config_examples import config
from runs_samples import sample_attempt, sample_record

from dino_exp.checkpoint.pins import load_pins, save_pins
from dino_exp.config.compare import as_mapping
from dino_exp.config.stored import CANONICAL_NAME, YAML_NAME, load_stored, write_stored
from dino_exp.errors import DinoExpError
from dino_exp.runs.owner import load_owner, save_owner, this_owner
from dino_exp.runs.record import Best, load_record, save_record

READERS: dict[str, Callable[[Path], Any]] = {
    "run.json": lambda path: load_record(path),
    "pins.json": lambda path: load_pins(path.parent),
    CANONICAL_NAME: lambda path: as_mapping(load_stored(path.parent)),
    YAML_NAME: lambda path: as_mapping(load_stored(path.parent)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("outputs") / "runs" / "vit_nano-1-2"
    directory.mkdir(parents=True)
    settings = config("experiment=digits_smoke", "run.note='a note'", "run.tags=[a,b]")
    write_stored(settings, directory)
    save_pins(directory, {2: "for the paper", 44: ""})
    attempts = (sample_attempt(1, ended_at="2026-01-01T01:00:00Z", outcome="completed"),)
    best = Best(step=44, metric="knn_top1", value=0.95)
    metrics = {"loss": 1.25, "knn_top1": 0.95}
    save_record(directory / "run.json", sample_record(state="completed", attempts=attempts, metrics=metrics, best=best))
    return directory


def flips(data: bytes, places: range, bits: range) -> list[bytes]:
    """Copies with one changed bit: in each place the bit of its number, or with several `bits` all of these."""
    changed = [(at, at % 8 if len(bits) == 1 else bit) for at in places for bit in bits]
    return [data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :] for at, bit in changed]


def noticed(path: Path, read: Callable[[Path], Any], variants: list[bytes]) -> int:
    """How many were refused; the others must give what the whole file gives."""
    whole, expected, num = path.read_bytes(), read(path), 0
    try:
        for data in variants:
            path.write_bytes(data)
            try:
                found = read(path)
            except DinoExpError:
                num += 1
            else:
                assert found == expected, next(at for at in range(len(whole)) if data[at] != whole[at])
    finally:
        path.write_bytes(whole)
    return num


@pytest.mark.parametrize("name", READERS)
def test_every_byte_or_a_sample(name: str, run: Path) -> None:
    """Settings take milliseconds to read, so of their bytes a sample, and all of them in the crash suite."""
    data = (run / name).read_bytes()
    stride = 41 if name in (YAML_NAME, CANONICAL_NAME) else 1
    variants = flips(data, range(0, len(data), stride), range(1))
    num = noticed(run / name, READERS[name], variants)
    assert num > len(variants) / 2
    assert num == len(variants) or name != "pins.json"


@pytest.mark.crash
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", READERS)
def test_every_byte_and_where_it_is_quick_every_bit(name: str, run: Path) -> None:
    data = (run / name).read_bytes()
    variants = flips(data, range(len(data)), range(1 if name in (YAML_NAME, CANONICAL_NAME) else 8))
    num = noticed(run / name, READERS[name], variants)
    print(f"{name}: {len(variants)} flips, {num} noticed, {len(variants) - num} harmless, none believed")


def test_a_flipped_owner_is_refused_or_another_owner(tmp_path: Path) -> None:
    """It has no digest: what counts of it is the token, and a changed one never makes this process the owner."""
    path = tmp_path / "owner.json"
    owner = this_owner(token="f" * 32, attempt=1, now_secs=1.7e9)
    save_owner(path, owner, durable=False)
    data = path.read_bytes()
    at = data.index(owner.token.encode())
    for variant in flips(data, range(at, at + 32), range(8)):
        path.write_bytes(variant)
        try:
            found = load_owner(path)
        except DinoExpError:
            continue
        assert found is not None
        assert found.token != owner.token
