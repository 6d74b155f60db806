"""`init.weights=` before there is a run: which run a command leads to, what is taken, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import cli
from config_examples import config, mapping
from weights_samples import SMALL, make_weights_run, teacher_of, trained_state

import dino_exp
from dino_exp import build
from dino_exp.attempts.initial import DIGEST, PATH, take_weights, touched_with_digest, with_weights
from dino_exp.attempts.target import Target, start_target
from dino_exp.config.canonical import canonical_text, config_hash
from dino_exp.config.check import config_from_mapping
from dino_exp.config.schema import Config
from dino_exp.errors import ConfigError, CorruptCheckpointError, RefusedError, UsageError
from dino_exp.training.state import TrainState
from dino_exp.weights.files import file_digest
from dino_exp.weights.formats import official_checkpoint, safetensors_bytes, torch_bytes
from dino_exp.weights.names import to_hub

STATE = trained_state()
ARCHITECTURE = '{"image_size":16,"patch_size":4,"in_channels":1,"embed_dim":16,"depth":2,"num_heads":2,"mlp_ratio":4}'
NO_DIGEST = f"{DIGEST}=sha256:{'0' * 64}"


@pytest.fixture
def official(tmp_path: Path) -> Path:
    models = {"teacher": STATE.teacher.state_dict(), "student": STATE.student.state_dict()}
    path = tmp_path / "dino.pth"
    path.write_bytes(torch_bytes(official_checkpoint(models, STATE.center_1K, 3, {})))
    return path


def target(*overrides: str) -> Target:
    return start_target(mapping(*overrides))


def settings(path: Path, *overrides: str) -> Config:
    return with_weights(config(*SMALL, *overrides, f"{PATH}={path}"))


def fresh(chosen: Config) -> TrainState:
    return build.build_state(chosen, 1 if chosen.data.name == "digits" else 3, torch.device("cpu"))


def test_the_digest_is_identity_and_the_path_is_not(official: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(official.read_bytes())
    outputs = f"paths.outputs={tmp_path}"
    plain, one, other = target(outputs), target(outputs, f"{PATH}={official}"), target(outputs, f"{PATH}={copy}")
    assert one.key == other.key != plain.key
    assert one.config.init.weights_digest == file_digest(official)
    assert str(tmp_path) not in canonical_text(one.config)
    assert "weights" not in canonical_text(plain.config)
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert target(outputs, f"{PATH}={copy}").key != one.key  # read again, because it changed


def test_a_relative_path_is_kept_as_the_place_it_means(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_weights(config(f"{PATH}=dino.pth")).init.weights == str(official)


def test_the_hash_without_weights_is_what_it_was() -> None:
    plain = mapping()
    old = {**plain, "init": {"scheme": plain["init"]["scheme"]}}  # a configuration of before there were weights
    assert config_hash(config_from_mapping(old)) == config_hash(config())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((NO_DIGEST,), f"{DIGEST} is set by init.weights=<file>: give the file"),
        ((NO_DIGEST, f"{PATH}=x"), "found by reading the file"),
        (("fork=last", f"{PATH}=x"), "fork and init.weights are both set"),
        ((f"{DIGEST}=abc", f"{PATH}=x"), DIGEST),
    ],
)
def test_combinations_that_cannot_be(overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        target(*overrides)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "gone.pth", "no such file"), (tmp_path, "a folder, expected a file of weights")):
        with pytest.raises(UsageError, match=says):
            target(f"{PATH}={path}", f"paths.outputs={tmp_path}")
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(print))
    chosen = settings(tmp_path / "bad.pth")
    with pytest.raises(RefusedError, match="nothing else is read"):
        take_weights(chosen, fresh(chosen))


def test_a_resume_compares_the_digest_where_a_file_is_named() -> None:
    assert touched_with_digest({PATH, "seed"}) == {PATH, DIGEST, "seed"}
    assert touched_with_digest({"seed"}) == {"seed"}


def test_student_and_teacher_begin_alike(official: Path) -> None:
    chosen = settings(official)
    state = fresh(chosen)
    found = take_weights(chosen, state)
    expected = STATE.teacher.state_dict()
    for model in (state.student, state.teacher):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert (found["path"], found["digest"], found["source"]) == (str(official), file_digest(official), "teacher")
    assert found["text"] == f"{len(expected)} tensors loaded"
    assert not any(parameter.requires_grad for parameter in state.teacher.parameters())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model.embed_dim=32",), "What fits: model.embed_dim=16 model.depth=2 model.mlp_ratio=4$"),
        (("model.depth=3",), "the file has no blocks.2.norm1.weight"),
        (("model.depth=1",), "the model has no blocks.1.norm1.weight"),
        (("data.patch_size=2",), r"data\.patch_size=4$"),
        (
            ("data=synthetic", "augment=dino", "data.patch_size=4"),
            r"patch_embed\.proj\.weight is \(16, 1, 4, 4\) in the file, \(16, 3, 4, 4\) in the model.*"
            "they need images of 1 channels, data=synthetic has 3$",
        ),
    ],
)
def test_weights_of_another_model_are_refused_with_what_fits(
    official: Path, overrides: tuple[str, ...], says: str
) -> None:
    chosen = settings(official, *overrides)
    state = fresh(chosen)
    before = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
    with pytest.raises(ConfigError, match=says) as caught:
        take_weights(chosen, state)
    assert f"{PATH}={official}: these weights are of another model: " in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.student.state_dict().items())


def test_a_choice_of_conf_is_named_where_one_fits(tmp_path: Path) -> None:
    small = config("model=vit_t")
    path = tmp_path / "t.pth"
    path.write_bytes(torch_bytes({"teacher": fresh(small).teacher.state_dict()}))
    chosen = with_weights(config("model=vit_nano", f"{PATH}={path}"))
    with pytest.raises(ConfigError, match=r"What fits: model=vit_t$"):
        take_weights(chosen, fresh(chosen))


def test_another_head_and_another_grid_are_told(official: Path) -> None:
    chosen = settings(official, "loss.out_dim=12", "data.image_size=24", "data.local_size=12")
    state = fresh(chosen)
    found = take_weights(chosen, state)
    assert found["resized"] == [4, 6]
    assert "30 tensors loaded; position table resized from 4x4 to 6x6; 18 not in the file stay" in found["text"]
    assert "its head was not taken: last_layer.weight_g is (24, 1) in the file, (12, 1) in the model" in found["text"]
    assert torch.equal(state.teacher.head.last_layer.weight_v, fresh(chosen).teacher.head.last_layer.weight_v)
    assert torch.equal(state.teacher.backbone.norm.weight, STATE.teacher.backbone.norm.weight)


@pytest.mark.parametrize(("form", "name"), [("safetensors", "t.safetensors"), ("pth", "t.pth"), ("hf", "hub")])
def test_every_export_is_a_beginning(tmp_path: Path, form: str, name: str) -> None:
    run = make_weights_run(tmp_path, STATE)
    assert cli("export", run, "--format", form, "--to", tmp_path / name).code == 0
    chosen = settings(tmp_path / name / "model.safetensors" if form == "hf" else tmp_path / name)
    state = fresh(chosen)
    found = take_weights(chosen, state)
    expected = teacher_of(STATE).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.student.backbone.state_dict().items())
    assert found["num_missing"] == (0 if form == "pth" else 18)
    assert found["source"] == ("teacher (HuggingFace names)" if form == "hf" else "teacher")


TYPES = ("float8_e4m3fn", "float8_e5m2", "bool", "int32", "uint16", "complex64")


@pytest.mark.parametrize("name", TYPES)
def test_values_that_are_no_floating_numbers_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    """A norm's weights alone of another type are as wrong as all of them."""
    teacher = {key: tensor.clone() for key, tensor in teacher_of(STATE).state_dict().items()}
    teacher["norm.weight"] = torch.ones(16).to(getattr(torch, name))
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(teacher, {"architecture": ARCHITECTURE}))
    chosen = settings(tmp_path / "w.safetensors")
    state = fresh(chosen)
    before = state.student.state_dict()["backbone.norm.weight"].clone()
    with pytest.raises(
        ConfigError, match=rf"norm\.weight holds values of type {name}, expected one of float16"
    ) as caught:
        take_weights(chosen, state)
    assert "\n" not in str(caught.value)
    assert torch.equal(state.student.state_dict()["backbone.norm.weight"], before)
    with pytest.raises(CorruptCheckpointError, match=f"of type {name}, expected one of"):
        dino_exp.load_backbone(tmp_path / "w.safetensors")


def test_parts_of_one_tensor_of_different_types_are_not_put_together(tmp_path: Path) -> None:
    hub = to_hub(teacher_of(STATE).state_dict())
    key = next(name for name in hub if name.endswith("attention.key.weight"))
    hub[key] = hub[key].to(torch.float8_e4m3fn)
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(hub, {}))
    chosen = settings(tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"the file has no blocks\.0\.attn\.qkv\.weight"):
        take_weights(chosen, fresh(chosen))


@pytest.mark.parametrize(("form", "name"), [("safetensors", "t.safetensors"), ("pth", "t.pth")])
def test_an_export_of_other_heads_is_refused_although_its_shapes_fit(tmp_path: Path, form: str, name: str) -> None:
    run = make_weights_run(tmp_path, STATE)
    assert cli("export", run, "--format", form, "--to", tmp_path / name).code == 0
    chosen = settings(tmp_path / name, "model.num_heads=4")
    with pytest.raises(ConfigError, match=r"it has 2 heads, model\.num_heads is 4"):
        take_weights(chosen, fresh(chosen))


def test_a_file_that_changed_since_the_run_got_its_name_is_refused(official: Path) -> None:
    chosen = settings(official)
    official.write_bytes(torch_bytes({"teacher": STATE.student.state_dict()}))
    with pytest.raises(RefusedError, match="is not the file that this run is named by any more"):
        take_weights(chosen, fresh(chosen))


@pytest.mark.parametrize(
    "weights", ["text", 3, [], {"path": 1}, {"path": "PATH", "digest": "no digest"}, {"path": "PATH"}]
)
def test_records_of_strangers_do_not_lead_astray(tmp_path: Path, weights: Any) -> None:
    """Where the file is gone, runs beside are asked whether they began with it; they may say anything."""
    from dataclasses import replace

    from dino_exp.runs.record import load_record, save_record

    gone = str(tmp_path / "gone.pth")
    run = make_weights_run(tmp_path, STATE)
    record = load_record(run / "run.json")
    assert record is not None
    if isinstance(weights, dict):
        weights = {name: gone if value == "PATH" else value for name, value in weights.items()}
    save_record(run / "run.json", replace(record, weights=weights))
    with pytest.raises(UsageError, match="no such file"):
        target(f"{PATH}={gone}", f"paths.outputs={tmp_path}")
    shown = cli("show", run, noun="runs")
    assert (shown.code, shown.err) == (0, "")


def test_a_record_without_weights_is_written_as_before(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, STATE)
    assert '"weights"' not in (run / "run.json").read_text()
