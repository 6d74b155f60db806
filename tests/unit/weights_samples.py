"""Runs with a checkpoint of a small real model, made without training: milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from cli_samples import make_run
from config_examples import config
from support.checkpoints import open_manager, request

from dino_exp import build
from dino_exp.config.canonical import canonical_text, config_hash
from dino_exp.config.schema import Config
from dino_exp.models.vit import VisionTransformer
from dino_exp.training.state import TrainState

SMALL = (
    "model.embed_dim=16", "model.depth=2", "model.num_heads=2", "loss.out_dim=24", "loss.hidden_dim=16",
    "loss.bottleneck_dim=8",
)  # fmt: skip
GREY = config(*SMALL)
COLOUR = config(*SMALL, "data=synthetic", "augment=dino")


class Parts:
    """A state of which only some parts are saved, as in a checkpoint that was thinned."""

    def __init__(self, state: TrainState, prefixes: tuple[str, ...]) -> None:
        self.state, self.prefixes = state, prefixes

    def state_dict(self) -> dict[str, Any]:
        flat = self.state.state_dict()
        return {
            name: value
            for name, value in flat.items()
            if not isinstance(value, torch.Tensor) or name.startswith(self.prefixes)
        }

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("nobody restores it")


def trained_state(settings: Config = GREY) -> TrainState:
    """A state whose teacher differs from its student in every tensor, and whose centre is not zero."""
    state = build.build_state(settings, 1 if settings.data.name == "digits" else 3, torch.device("cpu"))
    with torch.no_grad():
        for index, tensor in enumerate(state.teacher.parameters()):
            tensor += 0.05 * torch.cos(torch.arange(tensor.numel(), dtype=torch.float32) + index).view(tensor.shape)
        state.center_1K += torch.linspace(-1, 1, state.center_1K.numel())
    state.step = 4
    return state


def make_weights_run(
    outputs: Path, state: TrainState, settings: Config = GREY, *, only: tuple[str, ...] = ("",), **record: Any
) -> Path:
    """A run below `outputs` whose one checkpoint, of step 4, holds the tensors of `state` that begin with `only`."""
    run = make_run(outputs)
    facts = {
        "run_key": run.name,
        "config_hash": config_hash(settings),
        "git_commit": "f" * 40,
        "git_dirty": False,
        "config": canonical_text(settings),
    }
    manager = open_manager(run / "checkpoints")
    manager.save(Parts(state, only), request(4, record=facts | record))
    manager.drain()
    return run


def teacher_of(state: TrainState) -> VisionTransformer:
    backbone = state.teacher.backbone
    assert isinstance(backbone, VisionTransformer)
    return backbone.eval()


def images(num: int, channels: int, side: int) -> torch.Tensor:
    count = num * channels * side * side
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float32)).view(num, channels, side, side)
