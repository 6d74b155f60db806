"""Manifests of a stranger who seals them properly, and of a failing disk: read as they say, or refused."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support.checkpoints import ToyState, save_steps
from support.hostile import agrees, amounts, attempt, fuzz, sealed, torn

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.generators import restore_generators
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.manifest_parse import parse_manifest
from dino_exp.checkpoint.reader import CheckpointReader

NAME = "step-000000002.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_steps(folder, [1, 2])
    return folder


@pytest.fixture(scope="module")
def body(folder: Path) -> dict[str, Any]:
    return unseal((folder / NAME).read_bytes(), NAME)


def read_as_said(data: bytes) -> None:
    manifest = parse_manifest(data, NAME)
    said = unseal(data, NAME)
    got = unseal(manifest_to_bytes(manifest), NAME)
    wrong = [name for name, value in got.items() if not agrees(value, said.get(name))]
    assert not wrong, [(name, str(got[name])[:200], str(said.get(name))[:200]) for name in wrong]
    indexed = parse_manifest(data, NAME, with_tensors=False)
    assert repr(replace(indexed, tensors=manifest.tensors)) == repr(manifest)  # by their texts: NaN is not NaN


@amounts(200, 8_000)
def test_a_sealed_manifest_is_read_as_it_says_or_refused(num: int, body: dict[str, Any]) -> None:
    fuzz(sealed(body), read_as_said, num)


@amounts(150, 4_000)
def test_a_torn_manifest_is_refused(num: int, folder: Path) -> None:
    whole = (folder / NAME).read_bytes()

    def check(data: bytes) -> None:
        parse_manifest(data, NAME)
        assert data == whole

    fuzz(torn(whole) | st.just(whole), check, num)


@amounts(80, 5_000)
def test_every_reading_verb_over_a_hostile_manifest(
    num: int, folder: Path, body: dict[str, Any], tmp_path: Path
) -> None:
    """Also what was read goes on into listings, rankings, verification and live states."""
    shutil.copytree(folder, tmp_path / "c")
    reader = CheckpointReader(tmp_path / "c")
    before = sorted(tmp_path.rglob("*"))

    def check(data: bytes) -> None:
        (tmp_path / "c" / NAME).write_bytes(data)
        for read in (
            reader.rows, reader.verify, lambda: reader.show(2), lambda: reader.resolve("best"),
            lambda: reader.load_tensors(2), lambda: reader.restore(ToyState(), 2),
        ):  # fmt: skip
            attempt(read)
        assert sorted(tmp_path.rglob("*")) == before
        read_as_said(data)

    fuzz(sealed(body), check, num)


@amounts(80, 5_000)
def test_hostile_generators_are_put_back_or_refused(num: int, folder: Path, body: dict[str, Any]) -> None:
    """They go into C code: a position outside the generator's words would read beyond them."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    generators = {"generators": body["generators"]}

    def check(changed: bytes) -> None:
        said = unseal(changed, NAME)
        data = seal({**body, "generators": said.get("generators")})
        restore_generators(parse_manifest(data, NAME))
        assert 0 <= np.random.get_state()[2] <= 624
        random.random(), np.random.rand(), torch.rand(1)

    try:
        fuzz(sealed(generators), check, num)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
