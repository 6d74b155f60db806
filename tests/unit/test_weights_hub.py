"""The HuggingFace folder, read by transformers itself: no name missing or left over, and the same class token."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_samples import cli
from weights_samples import COLOUR, GREY, images, make_weights_run, teacher_of, trained_state

from dino_exp import build
from dino_exp.config.schema import Config
from dino_exp.data.augment_dino import DinoAugment
from dino_exp.data.images import Images
from dino_exp.weights.names import from_hub, to_hub


@pytest.fixture(scope="module")
def transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at its import
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # its own affair
        import transformers

    transformers.utils.logging.set_verbosity_error()
    return transformers


@pytest.mark.parametrize("settings", [GREY, COLOUR], ids=["grey", "colour"])
def test_transformers_reads_the_folder(transformers: Any, settings: Config, tmp_path: Path) -> None:
    state = trained_state(settings)
    folder = tmp_path / "hub"
    assert cli("export", make_weights_run(tmp_path, state, settings), "--format", "hf", "--to", folder).code == 0
    model, info = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.layer_norm_eps == 1e-6
    assert model.config.dino_exp["step"] == "4"
    teacher = teacher_of(state)
    side = settings.data.image_size
    pixels = images(4, teacher.patch_embed.proj.in_channels, side)
    with torch.no_grad():
        theirs = model(pixels).last_hidden_state
        assert (theirs[:, 0] - teacher(pixels)).abs().max() < 1e-5
        assert (theirs - teacher.forward_tokens(pixels)).abs().max() < 1e-5


def test_the_processor_does_what_evaluation_does_to_colour_images(transformers: Any, tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, trained_state(COLOUR), COLOUR)
    assert cli("export", run, "--format", "hf", "--to", tmp_path / "hub").code == 0
    named = (getattr(transformers, name, None) for name in ("CLIPImageProcessorPil", "CLIPImageProcessor"))
    processor = next(filter(None, named)).from_pretrained(tmp_path / "hub")  # before version 5 there is the second only
    clean = build.build_augment(COLOUR)
    assert isinstance(clean, DinoAugment)
    pictures_NHWC = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    theirs = np.stack(processor(list(pictures_NHWC))["pixel_values"])
    ours = clean.clean(Images.whole(torch.from_numpy(pictures_NHWC).permute(0, 3, 1, 2))).numpy()
    assert np.abs(theirs - ours).max() < 0.02  # a byte is 0.017: they round once more


def test_no_processor_is_promised_for_grey_images(tmp_path: Path) -> None:
    run = make_weights_run(tmp_path, trained_state())
    assert cli("export", run, "--format", "hf", "--to", tmp_path / "hub").code == 0
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["num_channels"] == 1


def test_names_there_and_back() -> None:
    tensors = teacher_of(trained_state()).state_dict()
    there = to_hub(tensors)
    assert there["encoder.layer.1.attention.attention.key.weight"].equal(tensors["blocks.1.attn.qkv.weight"][16:32])
    back = from_hub({f"vit.{name}": tensor for name, tensor in there.items()})
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_names_of_a_broken_file_stay_what_they_are() -> None:
    there = to_hub(teacher_of(trained_state()).state_dict())
    del there["encoder.layer.0.attention.attention.value.bias"]
    there["encoder.layer.0.lambda.weight"] = torch.ones(2)
    back = from_hub(there)
    assert "blocks.0.attn.qkv.bias" not in back
    assert "encoder.layer.0.lambda.weight" in back
