"""`dino-exp checkpoints export`: what the files hold, who reads them, and what is never overwritten."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cli_samples import cli, contents
from safetensors import safe_open
from support.checkpoints import Died, FaultyFiles, flip, no_space, pack_of
from weights_samples import COLOUR, GREY, images, make_weights_run, teacher_of, trained_state

from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.checkpoint.store import Store
from dino_exp.config.canonical import config_hash
from dino_exp.errors import CorruptCheckpointError, RefusedError
from dino_exp.models.vit import VisionTransformer
from dino_exp.runs.named import named
from dino_exp.weights.formats import HUB_FILES
from dino_exp.weights.placing import place_file, place_folder
from dino_exp.weights.source import open_checkpoint
from dino_exp.words import size_text

STATE = trained_state()
BACKBONE = teacher_of(STATE).state_dict()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_weights_run(tmp_path, STATE)


def equal(found: Any, expected: Any) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def load_as_the_official_code(path: Path, model: torch.nn.Module, checkpoint_key: str) -> None:
    """`utils.load_pretrained_weights` of facebookresearch/dino, in its own words, with `weights_only` and strict."""
    state_dict = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint_key is not None and checkpoint_key in state_dict:
        state_dict = state_dict[checkpoint_key]
    state_dict = {k.replace("module.", ""): v for k, v in state_dict.items()}
    state_dict = {k.replace("backbone.", ""): v for k, v in state_dict.items()}
    found = model.load_state_dict(state_dict, strict=False)
    assert found.missing_keys == []
    assert all(name.startswith("head.") for name in found.unexpected_keys)


def fresh_backbone() -> VisionTransformer:
    return VisionTransformer(image_size=16, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2)


def test_safetensors_has_official_names_and_says_where_it_comes_from(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    found = cli("export", f"{run}@best", "--to", file)
    assert (found.code, found.err) == (0, "")
    size = size_text(file.stat().st_size)
    assert found.lines[0] == f"exported teacher (30 tensors, {size}) of {run}@4 to {file}"
    assert f"load_backbone('{file}')" in found.lines[1]
    tensors = safetensors.torch.load_file(file)
    assert equal(tensors, BACKBONE)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.bias"} < tensors.keys()
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata.pop("architecture")) == {
        "image_size": 16, "patch_size": 4, "in_channels": 1,
        "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4,
    }  # fmt: skip
    assert metadata == {
        "format": "pt", "producer": "dino_exp", "part": "teacher", "run_key": run.name, "step": "4", "epoch": "2",
        "config_hash": config_hash(GREY), "git_commit": "f" * 40, "git_dirty": "false",
        "state_digest": CheckpointReader(run / "checkpoints").manifest(4).state_digest,
    }  # fmt: skip


def test_json_and_the_student(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "student.safetensors"
    found = cli("export", run, "--part", "student", "--to", file, "--json").json
    assert equal(safetensors.torch.load_file(file), STATE.student.backbone.state_dict())
    assert (found["path"], found["format"], found["parts"]) == (str(file), "safetensors", ["student"])
    assert (found["tensors"], found["bytes"]) == (30, file.stat().st_size)
    assert (found["run_key"], found["step"]) == (run.name, 4)


@pytest.mark.parametrize(("form", "name"), [("safetensors", "a.safetensors"), ("pth", "a.pth"), ("hf", "a")])
def test_equal_checkpoints_give_equal_bytes(run: Path, tmp_path: Path, form: str, name: str) -> None:
    written = []
    for folder in ("one", "two"):
        assert cli("export", run, "--format", form, "--to", tmp_path / folder / name).code == 0
        made = contents(tmp_path / folder)
        written.append({path.relative_to(tmp_path / folder): data for path, data in made.items()})
    assert written[0] == written[1]


def test_pth_is_read_by_the_official_code(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pth"
    found = cli("export", run, "--format", "pth", "--to", file)
    assert found.lines[0].startswith("exported teacher and student (96 tensors, ")
    loaded = torch.load(file, weights_only=True)
    assert loaded.keys() == {"student", "teacher", "dino_loss", "epoch", "dino_exp"}
    assert equal(loaded["teacher"], STATE.teacher.state_dict())
    assert equal(loaded["student"], {f"module.{k}": v for k, v in STATE.student.state_dict().items()})
    assert torch.equal(loaded["dino_loss"]["center"], STATE.center_1K)
    assert (loaded["epoch"], loaded["dino_exp"]["step"]) == (2, 4)
    for part, live in (("teacher", STATE.teacher.backbone), ("student", STATE.student.backbone)):
        model = fresh_backbone()
        load_as_the_official_code(file, model, part)
        with torch.no_grad():
            assert torch.equal(model(images(2, 1, 16)), live(images(2, 1, 16)))


def test_one_part_of_a_pth(run: Path, tmp_path: Path) -> None:
    assert cli("export", run, "--format", "pth", "--part", "teacher", "--to", tmp_path / "t.pt").code == 0
    assert torch.load(tmp_path / "t.pt", weights_only=True).keys() == {"teacher", "dino_loss", "epoch", "dino_exp"}


def test_a_thinned_checkpoint_gives_what_it_has(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, STATE, only=("teacher.",))
    file = tmp_path / "x.safetensors"
    refused = cli("export", run, "--part", "student", "--to", file)
    assert (refused.code, refused.out) == (4, "")
    assert "holds no student, only the teacher: it was thinned" in refused.err
    assert "no student" in cli("export", run, "--format", "pth", "--part", "student", "--to", tmp_path / "s.pth").err
    assert not file.exists()
    assert cli("export", run, "--to", file).code == 0
    assert equal(safetensors.torch.load_file(file), BACKBONE)
    told = cli("export", run, "--format", "pth", "--to", tmp_path / "x.pth")
    assert "the student is not in it" in told.out
    assert torch.load(tmp_path / "x.pth", weights_only=True).keys() == {"teacher", "epoch", "dino_exp"}
    assert cli("export", run, "--format", "hf", "--to", tmp_path / "hub").code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("{run}@9", "--to", "a.safetensors"), 4, "no checkpoint of step 9; steps here: 4"),
        (("{run}@newest", "--to", "a.safetensors"), 2, "latest, best or a step"),
        (("nothing", "--to", "a.safetensors"), 2, "no run"),
        (("{run}",), 2, "--to"),
        (("{run}", "--to", "a.pth"), 2, "--format pth"),
        (("{run}", "--to", "a"), 2, "expected a name with .safetensors"),
        (("{run}", "--format", "hf", "--to", "a.pth"), 2, "makes a folder"),
        (("{run}", "--format", "pth", "--to", "a.safetensors"), 2, "--format safetensors"),
        (("{run}", "--format", "onnx", "--to", "a.onnx"), 2, "onnx"),
        (("{run}", "--part", "both", "--to", "a.safetensors"), 2, "both"),
    ],
)
def test_wrong_words_are_told_and_nothing_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    found = cli("export", *(word.format(run=run) for word in words))
    assert (found.code, found.out) == (code, "")
    assert says in found.err
    assert contents(tmp_path) == before


def test_nothing_is_overwritten_unasked(run: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.safetensors", tmp_path / "hub"
    file.write_text("mine")
    folder.mkdir()
    for form, target in (("safetensors", file), ("hf", folder)):
        found = cli("export", run, "--format", form, "--to", target)
        assert (found.code, found.out) == (3, "")
        assert "nothing is overwritten" in found.err
    assert file.read_text() == "mine"
    assert list(folder.iterdir()) == []
    for form, target in (("safetensors", file), ("hf", folder)):
        assert cli("export", run, "--format", form, "--to", target, "--force").code == 0
    assert equal(safetensors.torch.load_file(file), BACKBONE)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "a.safetensors", "hub"}


def test_force_replaces_exports_only(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "file").write_text("mine")
    for form, name, says in (
        ("hf", "home", "holds 'thesis.tex' beside an export"),
        ("hf", "link", "is no folder"),
        ("hf", "file", "is no folder"),
        ("safetensors", "dir.safetensors", "is a folder"),
    ):
        found = cli("export", run, "--format", form, "--to", tmp_path / name, "--force")
        assert found.code == 3
        assert says in found.err
    assert (home / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("name", [".", "..", "../../hub/inner", "link/.."])
def test_the_current_directory_is_not_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = tmp_path / "hub" / "inner"
    here.mkdir(parents=True)
    (here / "link").symlink_to(here)
    monkeypatch.chdir(here)
    if name != "link/..":
        (here / "link").unlink()
    found = cli("export", run, "--format", "hf", "--to", name, "--force")
    assert found.code == 3
    assert "is the current directory, or one that holds it" in found.err
    assert here.samefile(".")
    assert cli("export", run, "--format", "hf", "--to", "beside").code == 0


def test_damage_is_told_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    manifest = CheckpointReader(run / "checkpoints").manifest(4)
    flip(pack_of(run / "checkpoints", 4), manifest.tensors["teacher.backbone.norm.weight"].chunks[0].start)
    for form, name in (("safetensors", "a.safetensors"), ("hf", "a"), ("pth", "a.pth")):
        found = cli("export", run, "--format", form, "--to", tmp_path / name)
        assert (found.code, found.out) == (4, "")
        assert "digest" in found.err
        assert not (tmp_path / name).exists()


def test_an_export_reads_only(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert cli("export", run, "--to", tmp_path / "a.safetensors").code == 0
    assert contents(run) == before


@pytest.mark.parametrize("error", [Died, no_space])
def test_a_folder_is_there_whole_or_as_it_was_whatever_fails(tmp_path: Path, error: Any) -> None:
    """The process dies, or the disk is full, at the first, second, third ... operation, until nothing fails."""
    old, new = (dict.fromkeys(HUB_FILES, text) for text in (b"old", b"new"))
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at) / "hub"
        place_folder(folder, old, force=False)
        files: Any = FaultyFiles(fail_at, error, once=error is not Died)
        failed = None
        try:
            place_folder(folder, new, force=True, files=files)
        except (Died, OSError) as problem:
            failed = problem
        there = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
        aside = folder.with_name(".hub.old")
        assert there in (old, new) or {path.name: path.read_bytes() for path in aside.iterdir()} == old
        place_folder(folder, new, force=True)  # and whatever was left, the next one tidies up
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == new
        assert [path.name for path in folder.parent.iterdir()] == ["hub"]
        if failed is None:
            assert fail_at > 15
            return
    pytest.fail("it never ended")


def test_what_appears_at_the_last_moment_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("somebody else's")
    with pytest.raises(RefusedError):
        place_file(file, b"mine", force=False, form="safetensors")
    assert file.read_text() == "somebody else's"


def test_a_checkpoint_that_is_written_anew_while_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction puts another manifest of the same step into place, and removes the packs of the old one."""
    weights = open_checkpoint(named(str(run), run.parent.parent))
    store = Store(run / "checkpoints")
    real = CheckpointReader.load_tensors
    calls = []

    def compacted(reader: CheckpointReader, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            manifest = replace(weights.manifest, reasons=("compacted",))
            store.manifest_path(4).write_bytes(manifest_to_bytes(manifest))
            raise CorruptCheckpointError("a pack is gone")
        return real(reader, *arguments)

    monkeypatch.setattr(CheckpointReader, "load_tensors", compacted)
    assert equal(weights.tensors("teacher.backbone."), BACKBONE)
    assert len(calls) == 2
    monkeypatch.setattr(
        CheckpointReader, "load_tensors", lambda *_: (_ for _ in ()).throw(CorruptCheckpointError("bad"))
    )
    with pytest.raises(CorruptCheckpointError, match="bad"):
        weights.tensors("teacher.backbone.")


def test_a_safetensors_file_is_aligned_whatever_its_metadata(run: Path, tmp_path: Path) -> None:
    for variant in ("a", "ab", "abc"):
        file = tmp_path / f"{variant}.safetensors"
        again = make_weights_run(tmp_path / variant, STATE, run_key=variant)
        assert cli("export", again, "--to", file).code == 0
        (num,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert num % 8 == 0
        assert equal(safetensors.torch.load_file(file), BACKBONE)


def test_a_pipe_at_the_end_is_no_target(run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.safetensors")
    assert cli("export", run, "--to", tmp_path / "p.safetensors").code == 3


def test_colour_says_so(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, trained_state(COLOUR), COLOUR)
    found = cli("export", run, "--to", tmp_path / "c.safetensors", "--json").json
    assert (found["architecture"]["in_channels"], found["architecture"]["image_size"]) == (3, 32)
