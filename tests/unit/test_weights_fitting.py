"""What of a file fits a model: plain tables of names and shapes, and the tensors afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_samples import trained_state

from dino_exp.models.vit import VisionTransformer
from dino_exp.weights.architecture import Architecture, Dimensions, dimensions_of
from dino_exp.weights.files import WeightFile
from dino_exp.weights.fitting import MisfitError, load_into, plan_fit, resized_positions
from dino_exp.weights.names import ModelTensors

MODEL: dict[str, tuple[int, ...]] = {
    "backbone.cls_token": (1, 1, 4),
    "backbone.pos_embed": (1, 5, 4),
    "backbone.patch_embed.proj.weight": (4, 1, 2, 2),
    "backbone.blocks.0.mlp.fc1.weight": (16, 4),
    "head.mlp.0.weight": (3, 4),
    "head.last_layer.weight_v": (7, 3),
}
BACKBONE = {name.removeprefix("backbone."): shape for name, shape in MODEL.items() if name.startswith("backbone.")}
HEAD = {name.removeprefix("head."): shape for name, shape in MODEL.items() if name.startswith("head.")}


def test_all_fits() -> None:
    fit = plan_fit(BACKBONE, HEAD, MODEL)
    assert (set(fit.loaded), fit.missing, fit.unexpected, fit.resized, fit.head_left) == (
        set(MODEL),
        (),
        (),
        None,
        None,
    )
    assert fit.text == "6 tensors loaded"


def test_a_backbone_alone_leaves_the_head_as_initialised() -> None:
    fit = plan_fit(BACKBONE, {}, MODEL)
    assert fit.missing == ("head.mlp.0.weight", "head.last_layer.weight_v")
    assert fit.text == (
        "4 tensors loaded; 2 not in the file stay as initialised (head.mlp.0.weight, head.last_layer.weight_v)"
    )


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ({**HEAD, "last_layer.weight_v": (65536, 3)}, r"weight_v is (65536, 3) in the file, (7, 3) in the model"),
        ({**HEAD, "mlp.9.weight": (1,)}, "mlp.9.weight is (1,) in the file, absent in the model"),
        ({"last_layer.weight_v": (7, 3)}, "mlp.0.weight is absent in the file, (3, 4) in the model"),
        ({"weight": (10, 4), "bias": (10,)}, "it is not a head of DINO"),
    ],
)
def test_a_head_is_taken_whole_or_left(head: dict[str, tuple[int, ...]], says: str) -> None:
    fit = plan_fit(BACKBONE, head, MODEL)
    assert says in (fit.head_left or "")
    assert f"its head was not taken: {fit.head_left}" in fit.text
    assert [name for name in fit.loaded if name.startswith("head.")] == []
    assert fit.unexpected == tuple(f"head.{name}" for name in head)
    assert set(fit.missing) == {"head.mlp.0.weight", "head.last_layer.weight_v"}


def test_a_position_table_of_another_grid_is_resized() -> None:
    fit = plan_fit({**BACKBONE, "pos_embed": (1, 197, 4)}, {}, MODEL)
    assert fit.resized == (14, 2)
    assert "position table resized from 14x14 to 2x2" in fit.text
    assert fit.as_json()["resized"] == [14, 2]


def test_what_others_keep_beside_a_backbone_is_reported_and_not_used() -> None:
    fit = plan_fit({**BACKBONE, "mask_token": (1, 4), "fc_norm.weight": (4,)}, {}, MODEL)
    assert fit.unexpected == ("backbone.mask_token", "backbone.fc_norm.weight")
    assert "2 not used (backbone.mask_token, backbone.fc_norm.weight)" in fit.text


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ({**BACKBONE, "cls_token": (1, 1, 8)}, r"cls_token is (1, 1, 8) in the file, (1, 1, 4) in the model"),
        ({**BACKBONE, "pos_embed": (1, 6, 4)}, "pos_embed is (1, 6, 4) in the file"),  # no square
        ({**BACKBONE, "pos_embed": (1, 5, 8)}, "pos_embed is (1, 5, 8) in the file"),
        ({**BACKBONE, "pos_embed": ()}, "pos_embed is () in the file"),
        ({"cls_token": (1, 1, 4)}, "the file has no pos_embed, patch_embed.proj.weight, blocks.0.mlp.fc1.weight"),
        ({}, "the file has no cls_token, pos_embed, patch_embed.proj.weight and 1 more"),
        ({**BACKBONE, "blocks.0.ls1.gamma": (4,)}, "the model has no blocks.0.ls1.gamma"),
        ({**BACKBONE, "blocks.1.mlp.fc1.weight": (16, 4)}, "the model has no blocks.1.mlp.fc1.weight"),
        ({**BACKBONE, "register_tokens": (1, 4, 4)}, "the model has no register_tokens"),
    ],
)
def test_a_backbone_is_taken_whole_or_refused(backbone: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(MisfitError) as caught:
        plan_fit(backbone, HEAD, MODEL)
    assert says in str(caught.value)


def test_records_of_absurd_files_stay_short() -> None:
    fit = plan_fit({**BACKBONE, **{f"fc.{'x' * 500}{n}": (1,) for n in range(10_000)}}, {}, MODEL)
    recorded = fit.as_json()
    assert (recorded["num_unexpected"], len(recorded["unexpected"])) == (10_000, 50)
    assert len(str(recorded)) < 10_000
    assert len(fit.text) < 1000


def test_dimensions_are_read_off_the_shapes() -> None:
    state = trained_state()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.teacher.backbone.state_dict().items()}
    found = dimensions_of(shapes)
    assert found == Dimensions(embed_dim=16, depth=2, hidden_dim=64, patch_size=4, in_channels=1, grid=4)
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        assert dimensions_of({**shapes, name: (3,)}) is None
    assert dimensions_of({**shapes, "pos_embed": (1, 6, 16)}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 3},
        {"patch_size": 5},
        {"depth": 0},
        {"embed_dim": True},
        {"mlp_ratio": float("nan")},
        {"depth": "2"},
    ],
)
def test_an_impossible_architecture_cannot_exist(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "image_size": 16, "patch_size": 4, "in_channels": 1,
        "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4,
    }  # fmt: skip
    assert Architecture(**good).hidden_dim == 64
    with pytest.raises(ValueError, match="expected"):
        Architecture(**good | wrong)


def weights_of(state: Any) -> WeightFile:
    backbone = dict(state.teacher.backbone.state_dict())
    return WeightFile(
        path=Path("w"), digest="", part=None, is_hub=False,
        model=ModelTensors(backbone=backbone, head=dict(state.teacher.head.state_dict())),
    )  # fmt: skip


def test_loading_puts_every_tensor_into_its_place() -> None:
    source, target = trained_state(), trained_state()
    fit = load_into(target.student, weights_of(source))
    assert len(fit.loaded) == len(target.student.state_dict())
    theirs = source.teacher.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in target.student.state_dict().items())
    assert all(parameter.requires_grad for parameter in target.student.backbone.parameters())


def test_a_resized_table_gives_the_features_that_the_old_model_has_at_that_size() -> None:
    """A model of 16 pixels on images of 8 resizes its table as it goes; one that begins with a resized one agrees."""
    old = trained_state().teacher.backbone
    assert isinstance(old, VisionTransformer)
    small = VisionTransformer(image_size=8, patch_size=4, in_channels=1, embed_dim=16, depth=2, num_heads=2)
    state = dict(old.state_dict())
    state["pos_embed"] = resized_positions(state["pos_embed"], 2)
    small.load_state_dict(state)
    pixels = torch.sin(torch.arange(2 * 64.0)).view(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(pixels), old(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [torch.tensor(float("nan")), torch.tensor(1e300, dtype=torch.float64)], ids=str)
def test_values_that_are_no_numbers_change_nothing(value: torch.Tensor) -> None:
    """Nor those that are none in the model's type."""
    file, target = weights_of(trained_state()), trained_state()
    bad = dict(file.model.backbone) | {"norm.weight": value.repeat(16)}
    before = {name: tensor.clone() for name, tensor in target.student.state_dict().items()}
    with pytest.raises(MisfitError, match=r"backbone\.norm\.weight: holds values that are no numbers"):
        load_into(target.student, replace(file, model=ModelTensors(backbone=bad, head={})))
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.student.state_dict().items())
