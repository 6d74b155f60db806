"""The registry and the pins of a stranger, and of a failing disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from support.checkpoints import save_steps
from support.hostile import agrees, amounts, fuzz, seal_text, sealed, torn

from dino_exp.checkpoint.canonical import unseal
from dino_exp.checkpoint.pins import load_pins, save_pins
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import CorruptCheckpointError
from dino_exp.words import size_text

NOTES = {2: "for the paper", 3: ""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    save_steps(folder, [1, 2, 3])
    save_pins(folder, NOTES)
    return folder


def facts_of(row: dict[str, Any]) -> dict[str, Any]:
    of_all = ("kinds", "shared_bytes", "frees_bytes")  # what follows from all rows, and from the policy
    return {name: value for name, value in row.items() if name not in of_all}


def said_in(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**group, **row} for group in body["versions"] for row in group["checkpoints"]]


@amounts(150, 4_000)
def test_a_sealed_registry_is_believed_as_it_says_or_passed_over(num: int, folder: Path) -> None:
    path, reader = folder / "registry.json", CheckpointReader(folder)
    body = unseal(path.read_bytes(), path.name)
    honest = {row["step"]: facts_of(row) for row in reader.rows()}
    believed = []

    def check(data: bytes) -> None:
        path.write_bytes(data)
        rows = reader.rows()
        assert [row["step"] for row in rows] == sorted(honest)
        for row in rows:
            json.dumps(row, allow_nan=False)
            size_text(row["bytes"])
            facts = facts_of(row)
            if facts != {**honest[row["step"]], "verified": False}:
                assert any(agrees(facts, said) for said in said_in(unseal(data, path.name))), row
                believed.append(row)
        assert reader.resolve("latest") == max(honest)
        assert reader.resolve("best") in honest
        assert reader.verify()["ok"]

    fuzz(sealed(body), check, num, both=False)
    assert believed


@amounts(120, 4_000)
def test_a_torn_registry_costs_nothing(num: int, folder: Path) -> None:
    path, reader = folder / "registry.json", CheckpointReader(folder)
    whole = path.read_bytes()
    honest = [{**row, "verified": False} for row in reader.rows()]

    def check(data: bytes) -> None:
        path.write_bytes(data)
        if data != whole:
            assert reader.rows() == honest

    fuzz(torn(whole), check, num, both=False)


@amounts(150, 4_000)
def test_sealed_pins_are_read_as_they_say_or_refused(num: int, folder: Path) -> None:
    path = folder / "pins.json"
    body = unseal(path.read_bytes(), path.name)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        pins = load_pins(folder)
        said = unseal(data, path.name)["pins"]
        assert {str(step): note for step, note in pins.items()} == said
        CheckpointReader(folder).rows()

    fuzz(sealed(body), check, num)


@amounts(120, 4_000)
def test_torn_pins_are_refused(num: int, folder: Path) -> None:
    path = folder / "pins.json"
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        assert load_pins(folder) == NOTES
        assert data == whole

    fuzz(torn(whole) | st.just(whole), check, num)


@pytest.mark.parametrize(
    "text", ["9" * 5000, "01", "-1", "1.0", " 1", "1_0", "\N{ARABIC-INDIC DIGIT THREE}", "1000000000", ""]
)
def test_steps_of_pins_are_plain_numbers(text: str, folder: Path) -> None:
    pins = json.dumps({"format_version": 1, "pins": {text: "note"}}, sort_keys=True, separators=(",", ":"))
    (folder / "pins.json").write_bytes(seal_text(pins.encode()))
    with pytest.raises(CorruptCheckpointError, match="nothing is dropped"):
        load_pins(folder)
