"""The settings of `dino_exp.evaluate`: what conf/ states, and what is refused."""

import functools

import pytest

from dino_exp.config.check import known_keys, section_from_mapping
from dino_exp.config.compose import EVALUATE, compose
from dino_exp.config.evaluate import EvaluateConfig, LinearConfig, listed
from dino_exp.config.explain import group_choices
from dino_exp.errors import ConfigError, DinoExpError
from dino_exp.evaluate import read_settings

CHOICES = group_choices(EvaluateConfig)["evaluation"]


@functools.cache
def settings(*overrides: str) -> EvaluateConfig:
    return read_settings(compose(overrides, EVALUATE))


def refusal(*overrides: str) -> str:
    with pytest.raises(DinoExpError) as caught:
        settings(*overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_conf_states_exactly_the_settings_of_the_schema():
    stated = set()
    for choice in CHOICES:
        plain = compose([f"evaluation={choice}"], EVALUATE)
        assert plain["evaluation"]["name"] == choice
        stated |= {
            f"{section}.{key}" if isinstance(values, dict) else section
            for section, values in plain.items()
            for key in (values if isinstance(values, dict) else [""])
        }
    assert stated == set(known_keys(EvaluateConfig))


def test_the_default_recipe_of_the_probe_is_the_official_one():
    probe = settings("of=last", "evaluation=linear").evaluation
    assert isinstance(probe, LinearConfig)
    assert (probe.epochs, probe.lr, probe.batch_size, probe.momentum) == (100, 0.001, 128, 0.9)
    assert (probe.num_blocks, probe.mean_patch) == (None, None)


def test_one_or_a_list():
    assert [listed(settings("of=last", f"evaluation.k={k}").evaluation.k) for k in ("7", "[7,1]")] == [(7,), (7, 1)]
    assert listed(settings("of=last", "evaluation=linear", "evaluation.lr=[1,0.5]").evaluation.lr) == (1.0, 0.5)
    assert settings("of=last", "evaluation.labels_per_class=[]").evaluation.labels_per_class == ()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "of: which checkpoint?"),
        (("of=null",), "of: which checkpoint?"),
        (("of=last", "evaluation.kk=1"), "evaluation.kk: there is no such setting"),
        (
            ("of=last", "+evaluation.lrr=1", "evaluation=linear"),
            "evaluation.lrr: there is no such setting; did you mean",
        ),
        (("of=last", "evaluation.kk=3"), "evaluation.kk: there is no such setting; did you mean evaluation.k?"),
        (("of=last", "prat=student"), "prat: there is no such setting; did you mean part?"),
        (("of=last", "evaluation=linea"), "there are attention, crops, features, knn, linear; did you mean linear?"),
        (
            ("of=last", "evaluation.k=abc"),
            "evaluation.k: expected a whole number or a list of whole numbers, got 'abc'",
        ),
        (("of=last", "evaluation.k=[1,0]"), "evaluation.k: expected at least 1, got 0"),
        (("of=last", "evaluation.lr=1"), "evaluation.lr: does not apply to this choice of evaluation"),
        (("of=last", "part=both"), "part: expected one of teacher, student, got 'both'"),
        (("of=last", "model=vit_s"), "model: a setting of trainings"),
        (("of=last", "evaluation=linear", "evaluation.lr=-1"), "evaluation.lr: expected more than 0"),
    ],
)
def test_a_wrong_override_gets_one_message(overrides, message):
    assert message in refusal(*overrides)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_training_says_whose_choices_these_are(choice):
    with pytest.raises(ConfigError, match=r"belongs to `python -m dino_exp\.evaluate of=<run>`"):
        compose([f"evaluation={choice}"])


def test_a_section_names_the_program_whose_settings_it_knows():
    with pytest.raises(ConfigError, match=r"runtime\.device: expected one of auto, cpu, cuda"):
        section_from_mapping(
            EvaluateConfig, compose(["of=last", "runtime.device=tpu"], EVALUATE), schema=EvaluateConfig
        )
