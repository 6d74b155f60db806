from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import ToyState, open_manager, request, save_steps, saved_manifest

from dino_exp.checkpoint.canonical import seal, unseal
from dino_exp.checkpoint.manifest import Chunk, TensorEntry, manifest_to_bytes
from dino_exp.checkpoint.pins import save_pins
from dino_exp.checkpoint.policies import KeepAny, LatestN
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.types import UnsupportedFormatError
from dino_exp.errors import NoCheckpointError, NothingSavedError, UsageError

FIELDS = {
    "step", "epoch", "kinds", "metrics", "bytes", "created_at", "config_hash", "git_commit", "code_id",
    "state_digest", "resumable", "verified", "content_bytes", "shared_bytes", "frees_bytes",
}  # fmt: skip


def test_reading_needs_no_torch_and_creates_nothing(tmp_path: Path) -> None:
    save_steps(tmp_path / "c", [1, 2])
    before = sorted(tmp_path.rglob("*"))
    code = (
        "import sys; from dino_exp.checkpoint.reader import CheckpointReader; r = CheckpointReader(sys.argv[1]);"
        "assert len(r.rows()) == 2 and r.verify()['ok'] and r.show('best')['tensors'];"
        "assert CheckpointReader(sys.argv[1] + '/nowhere').rows() == [];"
        "assert not {'torch', 'numpy'} & sys.modules.keys(), 'torch or numpy was imported'"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=True, env=environment)
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_have_the_fields_that_other_programs_use(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 9))
    rows = CheckpointReader(tmp_path).rows()
    assert [row["step"] for row in rows] == [2, 7, 8]
    assert all(set(row) == FIELDS for row in rows)
    assert [row["kinds"] for row in rows] == [["best", "milestone"], [], ["latest"]]
    for row in rows:
        files = [tmp_path / f"step-{row['step']:09d}.json", *(tmp_path / "packs").glob(f"step-{row['step']:09d}.*")]
        assert row["bytes"] == row["frees_bytes"] == sum(path.stat().st_size for path in files)
        assert (row["shared_bytes"], row["content_bytes"]) == (0, 36)
    assert all(row["verified"] and row["resumable"] for row in rows)


def test_show_adds_parent_and_tensors(tmp_path: Path) -> None:
    manager = open_manager(tmp_path)
    record = {"config_hash": "c1:a", "parent": {"run_key": "other", "step": 7}}
    manager.save(ToyState(1), request(1, record=record))
    shown = CheckpointReader(tmp_path).show("latest")
    assert shown.keys() >= FIELDS
    assert shown["parent"] == {"run_key": "other", "step": 7}
    assert shown["git_commit"] is None
    assert shown["tensors"][-1] == {"name": "student.weight", "dtype": "float32", "shape": [2, 3], "bytes": 24}


def test_words_steps_and_paths_name_a_checkpoint(tmp_path: Path) -> None:
    save_steps(tmp_path, range(1, 9))
    reader = CheckpointReader(tmp_path)
    path = tmp_path / "step-000000007.json"
    found = [reader.resolve(at) for at in ("latest", "best", 7, "7", path, str(path))]
    assert found == [8, 2, 7, 7, 7, 7]
    for at in ("newest", "", "-1", path.with_name("run.json"), tmp_path / "packs" / path.name):
        with pytest.raises(UsageError):
            reader.resolve(at)
    with pytest.raises(NoCheckpointError, match="steps here: 2, 7, 8") as caught:
        reader.resolve(3)
    assert str(caught.value).endswith(f"To see them: dino-exp checkpoints list {tmp_path.parent}")


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    reader = CheckpointReader(tmp_path / "nowhere")
    assert reader.rows() == []
    assert reader.verify() == {"ok": True, "checked": 0, "damaged": []}
    for at in ("latest", "best"):
        with pytest.raises(NothingSavedError, match="nothing has been saved yet"):
            reader.resolve(at)


def test_verify_names_the_damaged_tensors(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3], keep=KeepAny((LatestN(9),)))
    reader = CheckpointReader(tmp_path)
    entry = reader.manifest(2).tensors["student.weight"].chunks[0]
    pack = tmp_path / "packs" / entry.pack
    data = bytearray(pack.read_bytes())
    data[entry.start] ^= 1
    pack.write_bytes(data)
    (tmp_path / "step-000000003.json").write_bytes(b"{}")
    heard: list[tuple[int, int]] = []
    found = reader.verify(progress=lambda done, total: heard.append((done, total)))
    assert (found["ok"], found["checked"]) == (False, 3)
    assert [(item["step"], item["tensor"], item["pack"]) for item in found["damaged"]] == [
        (2, "student.weight", entry.pack),
        (3, None, None),
    ]
    assert heard[-1][0] <= heard[-1][1]
    assert reader.verify([1]) == {"ok": True, "checked": 1, "damaged": []}
    assert [row["step"] for row in reader.rows()] == [1, 2]


def test_a_missing_pack_is_reported_once_for_each_tensor(tmp_path: Path) -> None:
    save_steps(tmp_path, [1])
    next((tmp_path / "packs").iterdir()).unlink()
    damaged = CheckpointReader(tmp_path).verify()["damaged"]
    assert {item["tensor"] for item in damaged} == {None, *ToyState().tensors}
    assert all("missing" in item["reason"] for item in damaged)


def test_tensors_are_loaded_by_prefix(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    loaded = CheckpointReader(tmp_path).load_tensors("latest", prefix="student.")
    assert loaded.keys() == {"student.weight", "student.half"}
    assert torch.equal(loaded["student.weight"], torch.full((2, 3), 2.0))


def test_a_tensor_in_pieces_is_put_together(tmp_path: Path) -> None:
    """As several ranks will write it."""
    manifest = saved_manifest(tmp_path, 1)
    (whole,) = manifest.tensors["student.weight"].chunks
    from dino_exp.checkpoint.digests import content_digest

    data = (tmp_path / "packs" / whole.pack).read_bytes()

    def half(row: int) -> Chunk:
        start = whole.start + 12 * row
        digest = content_digest(data[start : start + 12])
        return replace(
            whole,
            offset=(row, 0),
            shape=(1, 3),
            start=start,
            stored_bytes=12,
            stored_digest=digest,
            content_digest=digest,
        )

    entry = TensorEntry(dtype="float32", shape=(2, 3), chunks=(half(1), half(0)))
    sharded = replace(manifest, tensors={**manifest.tensors, "student.weight": entry}, state_digest=None)
    (tmp_path / "step-000000001.json").write_bytes(manifest_to_bytes(sharded))
    assert CheckpointReader(tmp_path).verify()["ok"]
    state = ToyState()
    open_manager(tmp_path).restore(state)
    assert state.is_of_step(1)


def test_pins_show_as_a_kind(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    save_pins(tmp_path, {1: "for the paper"})
    assert [row["kinds"] for row in CheckpointReader(tmp_path).rows()] == [["pinned"], ["latest", "best", "milestone"]]


def test_a_newer_checkpoint_is_neither_damaged_nor_dropped(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    path = tmp_path / "step-000000002.json"
    path.write_bytes(seal(unseal(path.read_bytes(), "manifest") | {"format_version": 3}))
    for act in (CheckpointReader(tmp_path).rows, CheckpointReader(tmp_path).verify, lambda: open_manager(tmp_path)):
        with pytest.raises(UnsupportedFormatError, match="newer version"):
            act()
    assert len(list((tmp_path / "packs").iterdir())) == 2


def test_an_unknown_codec_is_not_damage(tmp_path: Path) -> None:
    manifest = saved_manifest(tmp_path, 1)
    (chunk,) = manifest.tensors["student.weight"].chunks
    entry = replace(manifest.tensors["student.weight"], chunks=(replace(chunk, codec="delta/9"),))
    later = replace(manifest, tensors={**manifest.tensors, "student.weight": entry})
    (tmp_path / "step-000000001.json").write_bytes(manifest_to_bytes(later))
    with pytest.raises(UnsupportedFormatError, match="codec 'delta/9'"):
        open_manager(tmp_path).restore(ToyState())
    with pytest.raises(UnsupportedFormatError):
        CheckpointReader(tmp_path).verify()
    assert list((tmp_path / "quarantine").iterdir()) == []


def test_a_policy_that_this_version_does_not_know_still_lists(tmp_path: Path) -> None:
    manifest = saved_manifest(tmp_path, 1)
    (tmp_path / "step-000000001.json").write_bytes(manifest_to_bytes(replace(manifest, policy=[{"rule": "new"}])))
    assert CheckpointReader(tmp_path).rows()[0]["kinds"] == ["latest"]
