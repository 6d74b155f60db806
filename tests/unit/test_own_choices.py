"""A command that goes on from a run is composed beside that run's own kinds of data, augmentation and optimizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_samples import make_run
from config_examples import config

from dino_exp.attempts.own_choices import with_own_choices
from dino_exp.config.compose import compose, touched_keys
from dino_exp.config.stored import write_stored


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with another data set, augmentation and optimizer than the default ones."""
    made = make_run(tmp_path / "out puts")
    write_stored(config("optimizer=sgd", "data=synthetic", "augment=dino"), made)
    return made


def choices(run: Path, *words: str) -> tuple[str, ...]:
    arguments = [f"paths.outputs='{run.parents[1]}'", *words]
    given, own = with_own_choices(arguments)
    assert [word for word in given if word not in own] == arguments
    return own


@pytest.mark.parametrize("named", ["resume={key}", "fork={key}@best", "+fork='{path}'", "fork={key}@latest"])
def test_what_a_setting_needs_is_chosen_as_the_run_has_it(run: Path, named: str) -> None:
    named = named.format(key=run.name, path=run)
    assert choices(run, named, "optimizer.momentum=0.5") == ("optimizer=sgd",)
    assert choices(run, "augment.hue=0.1", "data.num_samples=9", named) == ("data=synthetic", "augment=dino")
    assert choices(run, named, "train.epochs=9") == ()
    words, own = with_own_choices([f"paths.outputs='{run.parents[1]}'", named, "optimizer.momentum=0.5"])
    assert compose(words)["optimizer"]["momentum"] == 0.5
    assert touched_keys([word for word in words if word not in own], own) & {"optimizer.name", "optimizer.lr"} == set()


def test_what_the_command_chooses_itself_stands(run: Path) -> None:
    named = f"fork={run.name}"
    assert choices(run, named, "optimizer=lars", "optimizer.momentum=0.5") == ()
    assert choices(run, named, "experiment=imagenet_vit_s16", "augment.hue=0.1", "optimizer.lr=1") == ("optimizer=sgd",)


def test_other_commands_are_left_as_they_are(run: Path, tmp_path: Path) -> None:
    assert choices(run, "optimizer.momentum=0.5") == ()
    assert choices(run, "--multirun", f"fork={run.name}", "optimizer.momentum=0.5,0.6") == ()
    assert choices(run, "fork=none_such", "optimizer.momentum=0.5") == ()
    assert choices(run, "fork=a@b@c", "optimizer.momentum=0.5") == ()
    assert choices(run, "fork='", "optimizer.momentum=0.5") == ()
    (run / "config.yaml").write_text("[")
    assert choices(run, f"fork={run.name}", "optimizer.momentum=0.5") == ()
