"""`run.json`, `owner.json` and files of JSON lines of a stranger, and of a failing disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from runs_samples import KEY, sample_attempt, sample_record
from support.hostile import agrees, amounts, changed_text, fuzz, torn

from dino_exp.errors import DinoExpError
from dino_exp.fsio import DamagedFileError
from dino_exp.runs import record as record_module
from dino_exp.runs.jsonl import read_lines
from dino_exp.runs.jsontext import spell
from dino_exp.runs.owner import load_owner, save_owner, this_owner
from dino_exp.runs.record import Best, RunRecord, load_record, save_record, shown_state
from dino_exp.runs.rows import RowWriter

FULL = sample_record(
    data_fingerprint="digits:1:abc",
    parent={"run_key": KEY, "step": 3, "asked": "last@best", "settings": "c1:", "state_digest": "s1:"},
    run_key=f"{KEY}-v-1",
    variant="v-1",
    tags=("a", "ü"),
    note="a note",
    attempts=(
        sample_attempt(1, ended_at="2026-01-01T01:00:00Z", outcome="failed", error="disk full"),
        sample_attempt(2, resumed_from=20, exact=False, why_not_exact=("threads 2, was 1",)),
    ),
    numerics={"device": "cpu", "threads": 2, "deterministic": True},
    step=30,
    epochs_done=3,
    metrics={"loss": 1.25, "knn_top1": 0.93, "a": float("inf"), "b": float("nan")},
    best=Best(step=20, metric="knn_top1", value=0.95),
    trackers={"wandb": {"id": "x1"}},
)


def members_of(record: RunRecord) -> dict[str, Any]:
    return record_module._members(record)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_record(tmp_path / "run.json", FULL)
    return tmp_path / "run.json"


def with_digest(text: bytes) -> bytes:
    """As a stranger writes it: the digest fits wherever the text can be parsed at all."""
    try:
        members = json.loads(text)
        digest = record_module._digest(members)
    except (ValueError, RecursionError):
        return text
    return text[:-1].rstrip() + b', "digest": "' + digest.encode() + b'"}' if isinstance(members, dict) else text


@amounts(250, 8_000)
def test_a_sealed_record_is_read_as_it_says_or_refused(num: int, path: Path) -> None:
    def check(text: bytes) -> None:
        path.write_bytes(with_digest(text))
        record = load_record(path)
        assert record is not None
        assert agrees(members_of(record), json.loads(text))
        shown_state(record, False)
        begun = record.begin(sample_attempt(len(record.attempts) + 1)).end("failed", ended_at="now")
        save_record(path.with_name("again.json"), begun)
        assert load_record(path.with_name("again.json")) is not None

    fuzz(changed_text(members_of(FULL), indent=2), check, num)


@amounts(150, 4_000)
def test_a_torn_record_is_refused_or_the_same(num: int, path: Path) -> None:
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        record = load_record(path)
        assert record is not None
        assert members_of(record) == members_of(FULL)

    fuzz(torn(whole) | st.just(whole), check, num)


@amounts(120, 4_000)
def test_an_owner_is_read_as_the_file_says_or_refused(num: int, tmp_path: Path) -> None:
    path = tmp_path / "owner.json"
    save_owner(path, this_owner(token="f" * 32, attempt=1, now_secs=1.7e9), durable=False)
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        owner = load_owner(path)
        assert owner is not None
        assert agrees(spell(vars(owner)), json.loads(data))
        owner.is_stale(1.7e9), owner.is_on_this_boot()
        assert len(owner.describe()) < 5000

    fuzz(changed_text(json.loads(whole), indent=2) | torn(whole), check, num)


@amounts(120, 4_000)
def test_lines_are_read_as_they_say_or_refused(num: int, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [{"time": "now", "kind": "saved", "step": n, "reasons": ["end"], "bytes": 10**n} for n in range(4)]
    whole = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        found = list(read_lines(path))
        assert found == [json.loads(line) for line in data.split(b"\n")[:-1]]

    changed = changed_text(lines[1]).map(
        lambda text: b"".join([whole[:40], whole[40:].partition(b"\n")[0], b"\n", text, b"\n"])
    )
    fuzz(changed | torn(whole), check, num)


@amounts(120, 4_000)
def test_rows_are_cut_at_a_position_or_refused(num: int, tmp_path: Path) -> None:
    """What was recorded with a checkpoint meets the file: nothing is cut unless the rows are there."""
    path = tmp_path / "metrics.jsonl"
    whole = b"".join(json.dumps({"step": n, "loss": 0.5}).encode() + b"\n" for n in range(6))
    position = (4, len(b"\n".join(whole.split(b"\n")[:4])) + 1)

    def check(data: bytes) -> None:
        path.write_bytes(data)
        writer = RowWriter(path)
        try:
            writer.open_at(*position)
        except DinoExpError:
            assert path.read_bytes() == data
            raise
        writer.close()
        assert path.read_bytes() == data[: position[1]]
        assert data[: position[1]].count(b"\n") == 4

    fuzz(torn(whole), check, num)


def test_an_owner_that_is_heard_of_in_the_far_future_is_described(tmp_path: Path) -> None:
    owner = this_owner(token="t", attempt=1, now_secs=1.7e9)
    for secs in (1e308, -1e308, float("inf"), float("nan")):
        path = tmp_path / "owner.json"
        path.write_text(json.dumps(spell(vars(replace(owner, started_at=secs, heartbeat_at=secs)))))
        found = load_owner(path)
        assert found is not None
        assert "an unknown time" in found.describe()
    (tmp_path / "owner.json").write_text("{}")
    with pytest.raises(DamagedFileError):
        load_owner(tmp_path / "owner.json")
