"""From settings to the numbers that objects are made with."""

import pytest
import torch

from dino_exp import build
from dino_exp.build import learning, peak_lr
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch, when its compiler is imported
@pytest.mark.parametrize("deterministic", [True, False])
def test_compiled_layers_are_as_deterministic_as_is_asked(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not, the compiler times kernels, and the next process may take another one."""
    words = ["experiment=digits_smoke", "runtime.compile=true", f"runtime.deterministic={str(deterministic).lower()}"]
    config = config_from_mapping(compose(words))
    state = build.build_state(config, 1, torch.device("cpu"))
    monkeypatch.setattr(learning, "_require_compiler", lambda: None)  # nothing is compiled before a first step
    dynamo, inductor = torch._dynamo.config, torch._inductor.config
    with (  # both are as before at the end
        dynamo.patch(recompile_limit=8, fail_on_recompile_limit_hit=False),
        inductor.patch(deterministic=not deterministic),
    ):
        build.prepare_layers(config.runtime, state)
        assert inductor.deterministic is deterministic
