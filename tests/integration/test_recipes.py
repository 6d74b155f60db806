"""Every recipe takes steps, by the real command: its own architecture and schedules, on small crops of small files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.pictures import small_tree
from support.runs import Lab, record, rows

from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose
from dino_exp.config.explain import group_choices
from dino_exp.data.cifar import CIFAR10

SLOW = ("imagenet_vit_b16", "imagenet_vit_b8", "imagenet_vit_s16_boosted")  # many weights, or as another one
SMALL = (
    "debug=step", "loss.out_dim=64", "loss.hidden_dim=32", "loss.bottleneck_dim=16",
    "augment.num_local_crops=1", "checkpoint=none", "runtime.threads=1",
)  # fmt: skip
RECIPES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in group_choices()["experiment"]]


def write_data(name: str, folder: Path) -> tuple[str, ...]:
    """Files as the data set `name` has them, and the words that lead to them."""
    if name == "folder":
        small_tree(folder, 60)
    elif name == "imagenet":
        small_tree(folder / "train", 24)
        small_tree(folder / "val", 3)
    elif name == "cifar10":
        (folder / CIFAR10.folder).mkdir(parents=True)
        for file in CIFAR10.files:  # black images, in files that take no place on the disk
            with (folder / CIFAR10.folder / file.name).open("wb") as empty:
                os.truncate(empty.fileno(), file.num_rows * CIFAR10.row_bytes)
    else:
        return ()
    return (f"data.root={folder}",)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_steps(lab: Lab, name: str) -> None:
    on_files = () if name.startswith("digits") else ("data.root=images",)
    recipe = config_from_mapping(compose([f"experiment={name}", *on_files]))
    data = write_data(recipe.data.name, lab.directory / "images")
    patch = recipe.data.patch_size
    lab.settings = (f"experiment={name}", *SMALL, f"train.batch_size={max(2, recipe.train.accumulate)}")
    num_steps = 2 if recipe.train.accumulate == 1 else 1
    lab.train(*data, f"data.image_size={2 * patch}", f"data.local_size={patch}", f"train.stop_after_steps={num_steps}")
    run = lab.only_run()
    assert record(run)["state"] == "stopped"
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert len(losses) == num_steps
    assert all(0 < loss < 10 for loss in losses)
    assert run.name.startswith(recipe.model.name)
