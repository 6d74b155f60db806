"""From settings to the numbers that objects are made with."""

import pytest

from dino_exp.build import peak_lr
from dino_exp.config.check import config_from_mapping
from dino_exp.config.compose import compose


def peak(*overrides: str) -> float:
    return peak_lr(config_from_mapping(compose(list(overrides))))


def test_a_wide_model_gets_a_smaller_learning_rate_where_the_recipe_says_so() -> None:
    assert peak() == peak("model=vit_s", "optimizer.scale_lr_to_width=null") == 3e-3
    assert peak("model=vit_s") == pytest.approx(3e-3 * (64 / 384) ** 0.5)


def test_the_papers_rule_is_linear_in_the_batch() -> None:
    scaled = ("optimizer.scale_lr_to_width=null", "optimizer.scale_lr_to_batch=256", "train.batch_size=64")
    assert peak(*scaled) == pytest.approx(3e-3 / 4)
