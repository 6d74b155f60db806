"""`dino_exp.load_backbone`: the same features as the live model, by every name that a checkpoint has."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from cli_samples import cli
from weights_samples import COLOUR, GREY, images, make_weights_run, teacher_of, trained_state

import dino_exp
from dino_exp.checkpoint.manifest import manifest_to_bytes
from dino_exp.checkpoint.reader import CheckpointReader
from dino_exp.errors import CorruptCheckpointError, DinoExpError, NoCheckpointError, UsageError
from dino_exp.models.vit import VisionTransformer
from dino_exp.runs.named import named
from dino_exp.weights.formats import safetensors_bytes
from dino_exp.weights.source import open_checkpoint

STATE = trained_state()
IMAGES = images(3, 1, 16)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_weights_run(tmp_path, STATE)


def same_features(model: VisionTransformer, other: VisionTransformer) -> bool:
    with torch.no_grad():
        ours = [model(IMAGES), model(IMAGES[..., :8, :8]), model.forward_tokens(IMAGES)]
        theirs = [other(IMAGES), other(IMAGES[..., :8, :8]), other.forward_tokens(IMAGES)]
    return all(map(torch.equal, ours, theirs))


def test_every_name_of_a_checkpoint_gives_the_teacher_bit_for_bit(run: Path, tmp_path: Path) -> None:
    names = (
        str(run), run, f"{run}@best", f"{run}@4", str(run / "checkpoints" / "step-000000004.json"),
        run / "checkpoints" / "step-000000004.json",
    )  # fmt: skip
    for name in names:
        model = dino_exp.load_backbone(name)
        assert same_features(model, teacher_of(STATE))
        assert not model.training
        assert model.pos_embed.requires_grad  # ready to be tuned
    for name in ("last", "last@latest", run.name[:12]):
        assert same_features(dino_exp.load_backbone(name, outputs=tmp_path), teacher_of(STATE))


def test_the_student_is_another_model(run: Path) -> None:
    student = dino_exp.load_backbone(run, part="student")
    assert not same_features(student, teacher_of(STATE))
    live = STATE.student.backbone
    assert isinstance(live, VisionTransformer)
    assert same_features(student, live.eval())
    with pytest.raises(UsageError, match="expected teacher or student"):
        dino_exp.load_backbone(run, part="head")  # type: ignore[arg-type]


def test_an_exported_file_gives_the_same_model(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "teacher.safetensors"
    assert cli("export", run, "--to", file).code == 0
    assert same_features(dino_exp.load_backbone(file), teacher_of(STATE))
    with pytest.raises(UsageError, match="holds the teacher, asked for was the student"):
        dino_exp.load_backbone(file, part="student")


def test_files_of_others_are_told_from_exports(run: Path, tmp_path: Path) -> None:
    pack = next((run / "checkpoints" / "packs").iterdir())
    with pytest.raises(UsageError, match="does not say which model"):
        dino_exp.load_backbone(pack)
    with pytest.raises(UsageError, match="no such file"):
        dino_exp.load_backbone(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depth": 300_000}, "its settings say .*depth=300000.* its tensors .*depth=2,"),
        ({"image_size": 2**30, "patch_size": 1}, "its settings say .*grid=1073741824"),
        ({"embed_dim": 2**40, "num_heads": 1}, "whole numbers"),
        ({"embed_dim": 10**4000, "mlp_ratio": 10**4000}, "whole numbers"),
        ({"mlp_ratio": 1e300}, "expected an mlp_ratio above 0 and below"),
        ({"in_channels": 9}, "in_channels=9"),
    ],
)
def test_what_a_strangers_file_says_of_its_model_is_compared_before_it_is_built(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, float], says: str
) -> None:
    weights = open_checkpoint(named(str(run), tmp_path))
    said = {**weights.architecture("teacher").as_json(), **change}
    file = tmp_path / "w.safetensors"
    file.write_bytes(safetensors_bytes(teacher_of(STATE).state_dict(), {"architecture": json.dumps(said)}))
    monkeypatch.setattr("dino_exp.weights.backbone.build_backbone", None)  # is not reached
    with pytest.raises(CorruptCheckpointError, match=says) as caught:
        dino_exp.load_backbone(file)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["dino.pth", "dino.pt"])
def test_a_file_that_does_not_say_its_model_is_sent_to_training(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UsageError, match=rf"expected a run or a \.safetensors file .* init\.weights=\S+/{name}$"):
        dino_exp.load_backbone(tmp_path / name)


def test_values_that_are_no_numbers_in_float32_are_refused(run: Path, tmp_path: Path) -> None:
    assert cli("export", run, "--to", tmp_path / "t.safetensors").code == 0
    data = (tmp_path / "t.safetensors").read_bytes()
    with safetensors.safe_open(tmp_path / "t.safetensors", "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load(data) | {"norm.weight": torch.full((16,), 1e300, dtype=torch.float64)}
    (tmp_path / "wide.safetensors").write_bytes(safetensors.torch.save(tensors, metadata))
    with pytest.raises(CorruptCheckpointError, match=r"norm\.weight holds values that are no numbers in float32"):
        dino_exp.load_backbone(tmp_path / "wide.safetensors")


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpointError, match="no checkpoint of step 5; steps here: 4"):
        dino_exp.load_backbone(f"{run}@5")
    with pytest.raises(UsageError, match="no run directory"):
        dino_exp.load_backbone(tmp_path / "nothing")


def test_a_thinned_checkpoint_has_the_teacher_only(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, STATE, only=("teacher.backbone.",))
    assert same_features(dino_exp.load_backbone(run), teacher_of(STATE))
    with pytest.raises(NoCheckpointError, match="holds no student, only the teacher: it was thinned"):
        dino_exp.load_backbone(run, part="student")
    bare = make_weights_run(tmp_path / "other", STATE, only=("loss.",))
    with pytest.raises(NoCheckpointError, match="holds no backbone"):
        dino_exp.load_backbone(bare)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "which settings made it"),
        ("[]", "do not describe a backbone"),
        ('{"model":{},"data":{}}', "do not describe a backbone"),
        ("{", "not strict JSON"),
        ("[" * 40, "nested"),
        ("heads", "heads that divide"),
        ("width", "its settings say"),
        ("text", "whole numbers"),
        ("ratio", "mlp_ratio"),
        ("huge", "its settings say"),
    ],
)
def test_settings_that_are_not_those_of_the_tensors_are_refused(tmp_path: Path, config: str, says: str) -> None:
    from dino_exp.config.canonical import canonical_text

    changes = {
        "heads": ('"num_heads":2', '"num_heads":3'),
        "width": ('"embed_dim":16', '"embed_dim":32'),
        "text": ('"depth":2', '"depth":"2"'),
        "ratio": ('"mlp_ratio":4', '"mlp_ratio":-4'),
        "huge": ('"depth":2', '"depth":2000000'),
    }
    text = canonical_text(GREY)
    if config in changes:
        was, now = changes[config]
        assert was in text
        config = text.replace(was, now)
    run = make_weights_run(tmp_path, STATE, config=config)
    with pytest.raises(CorruptCheckpointError, match=says) as caught:
        dino_exp.load_backbone(run)
    assert len(str(caught.value)) < 600


def test_a_manifest_without_one_of_its_tensors_is_refused(run: Path) -> None:
    manifest = CheckpointReader(run / "checkpoints").manifest(4)
    tensors = {name: entry for name, entry in manifest.tensors.items() if name != "teacher.backbone.norm.bias"}
    (run / "checkpoints" / "step-000000004.json").write_bytes(manifest_to_bytes(replace(manifest, tensors=tensors)))
    with pytest.raises(DinoExpError, match=r"norm\.bias: found none, expected \(16,\)"):
        dino_exp.load_backbone(run)


def test_a_flipped_byte_is_noticed(run: Path) -> None:
    manifest = CheckpointReader(run / "checkpoints").manifest(4)
    chunk = manifest.tensors["teacher.backbone.norm.weight"].chunks[0]
    pack = run / "checkpoints" / "packs" / chunk.pack
    content = bytearray(pack.read_bytes())
    content[chunk.start] ^= 1
    pack.write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        dino_exp.load_backbone(run)


def test_colour_models_know_their_channels(tmp_path: Path) -> None:
    state = trained_state(COLOUR)
    model = dino_exp.load_backbone(make_weights_run(tmp_path, state, COLOUR))
    colour = images(2, 3, 32)
    with torch.no_grad():
        assert torch.equal(model(colour), teacher_of(state)(colour))


def test_the_package_is_cheap_and_a_backbone_needs_no_hydra(run: Path) -> None:
    program = f"""
import sys
import dino_exp
heavy = ("torch", "numpy", "hydra", "omegaconf", "rich", "typer", "yaml")
assert not [name for name in heavy if name in sys.modules], sys.modules.keys()
model = dino_exp.load_backbone({str(run)!r})
assert not [name for name in ("hydra", "omegaconf", "rich", "typer", "sklearn") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=Path(__file__).parents[2])


def test_exporting_imports_torch_only_when_there_is_something_to_export() -> None:
    program = "import sys\nimport dino_exp.cli.export\nassert 'torch' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
