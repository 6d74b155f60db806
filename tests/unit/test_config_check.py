import dataclasses
import math
import re

import pytest
from config_examples import changed, config, mapping
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.checkpoint.policies import milestone_from_text
from dino_exp.config.check import config_from_mapping, did_you_mean, known_keys, suggest_keys
from dino_exp.config.fields import walk_schema
from dino_exp.config.image_sections import DinoAugmentConfig
from dino_exp.config.learning_sections import AdamWConfig, LarsConfig, SgdConfig
from dino_exp.config.schema import Config
from dino_exp.errors import ConfigError


def refusal(plain: object) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(plain)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_default_is_the_digits_recipe():
    made = config()
    assert (made.model.name, made.data.name, made.augment.name, made.loss.use_bn) == (
        "vit_nano",
        "digits",
        "digits",
        True,
    )
    assert (made.train.epochs, made.train.batch_size, made.optimizer.lr) == (45, 64, 3e-3)
    assert made.augment.global_area == (0.65, 1.0)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train__epochs", "abc", "train.epochs: expected a whole number, got 'abc'"),
        ("train__epochs", 3.0, "train.epochs: expected a whole number, got 3.0"),
        ("train__epochs", True, "train.epochs: expected a whole number, got True"),
        ("train__epochs", None, "train.epochs: expected a whole number, got None"),
        ("train__epochs", 0, "train.epochs: expected at least 1, got 0"),
        ("train__epochs", "???", "train.epochs: no value is given; add train.epochs=<value>"),
        ("optimizer__lr", 0.0, "optimizer.lr: expected more than 0, got 0.0"),
        ("optimizer__lr", math.nan, "optimizer.lr: expected a finite number, got nan"),
        ("optimizer__lr", -math.inf, "optimizer.lr: expected a finite number, got -inf"),
        ("optimizer__lr", "1e-3", "optimizer.lr: expected a number, got '1e-3'"),
        ("model__drop_path_rate", 1, "model.drop_path_rate: expected at most 0.99, got 1.0"),
        ("optimizer__betas", [0.9], "optimizer.betas: expected a list of 2 numbers, got [0.9]"),
        ("optimizer__betas", [0.9, "x"], "optimizer.betas: expected a list of 2 numbers"),
        ("augment__ratio", [2, 1], "augment.ratio: expected [low, high] in rising order, got [2.0, 1.0]"),
        ("loss__use_bn", 1, "loss.use_bn: expected true or false, got 1"),
        ("loss__use_bn", "yes", "loss.use_bn: expected true or false, got 'yes'"),
        ("train__precision", "fp8", "train.precision: expected one of fp32, bf16, fp16, got 'fp8'"),
        ("run__variant", "a/b", "run.variant: expected text of the form"),
        ("run__tags", "one", "run.tags: expected a list of texts, got 'one'"),
        ("checkpoint__keep__milestones", ["101%"], "checkpoint.keep.milestones: expected text of the form"),
        ("checkpoint__keep__milestones", ["0%"], "checkpoint.keep.milestones: expected text of the form"),
        ("checkpoint__save", 3, "checkpoint.save: expected a section with keys, got 3"),
        (
            "optimizer__name",
            "adam",
            "optimizer.name: expected one of adamw, sgd, lars, got 'adam'; did you mean adamw?",
        ),
        ("seed", 2**60, "seed: expected at most"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(key, value, expected):
    message = refusal(changed(**{key: value}))
    assert message.startswith(f"configuration: {expected}")


def test_whole_numbers_pass_for_numbers_and_for_text():
    made = config_from_mapping(
        changed(optimizer__clip_grad=3, run__variant=2, checkpoint__keep__milestones=[10, "12.5%", "100%"])
    )
    assert isinstance(made.optimizer.clip_grad, float)
    assert made.run.variant == "2"
    assert made.checkpoint.keep.milestones == ("10", "12.5%", "100%")


def test_all_problems_are_told_at_once():
    plain = changed(train__epochs="x", seed=-1)
    plain["modle"] = {}
    del plain["loss"]
    message = refusal(plain)
    assert message.startswith("configuration: 4 problems\n")
    for part in (
        "train.epochs",
        "seed",
        "modle: there is no such setting; did you mean model",
        "loss: expected",
    ):
        assert part in message


def test_a_key_of_another_choice_is_told_as_such():
    plain = mapping("optimizer=sgd")
    plain["optimizer"]["betas"] = [0.9, 0.999]
    assert "optimizer.betas: does not apply to optimizer=sgd" in refusal(plain)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "optimizer.lr"),
        ("lrr", "optimizer.lr"),
        ("optimzer.lr", "optimizer.lr"),
        ("train.epoch", "train.epochs"),
        ("epochs", "train.epochs"),
        ("checkpoint.keep.lasst", "checkpoint.keep.last"),
        ("runtime.batch_size", "train.batch_size, or evaluation.batch_size"),
    ],
)
def test_suggestions(word, meant):
    assert suggest_keys(word) == f"; did you mean {meant}?"


def test_a_key_like_no_other_lists_its_section_and_an_absurd_one_nothing():
    assert "; there are optimizer.name, optimizer.lr, " in suggest_keys("optimizer.learning_rate")
    assert suggest_keys("xyzzy") == ""
    assert did_you_mean("a", []) == ""


@given(st.data())
def test_every_milestone_that_a_configuration_takes_is_one(data: st.DataObject) -> None:
    (entry,) = (entry for key, entry in walk_schema(Config) if key == "checkpoint.keep.milestones")
    assert entry.setting is not None
    assert entry.setting.pattern is not None
    milestone_from_text(data.draw(st.from_regex(re.compile(entry.setting.pattern, re.ASCII), fullmatch=True)))


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("0.5%", 1),
        ("100.0%", 1),
        ("12.123456789%", 1),
        ("33.3333333333%", 0),
        ("0%", 0),
        ("0.0%", 0),
        ("100.1%", 0),
        ("0", 0),
        ("7", 1),
        ("%", 0),
    ],
)
def test_milestones_over_nothing_and_up_to_the_end(text: str, is_one: int) -> None:
    values = changed(checkpoint__keep__milestones=[text])
    if is_one:
        assert config_from_mapping(values).checkpoint.keep.milestones == (text,)
    else:
        assert "checkpoint.keep.milestones" in refusal(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model__num_heads": 5}, "model.num_heads=5 does not divide model.embed_dim=64"),
        ({"model__mlp_ratio": 0.001}, "hidden layers of 0.064 units: choose one that makes them 1 to 1,000,000 wide"),
        ({"model__mlp_ratio": 1e308}, "makes hidden layers of inf units"),
        ({"data__patch_size": 3}, "data.image_size=16 is not a multiple of data.patch_size=3"),
        ({"data__local_size": 20}, "data.local_size=20 is larger than data.image_size=16"),
        ({"data__num_classes": 3}, "data.num_classes=3 applies to data=synthetic only"),
        ({"scheduler__warmup_epochs": 46}, "scheduler.warmup_epochs=46 is longer than train.epochs=45"),
        ({"train__epochs": 2}, "shorten the warm-up, such as scheduler.warmup_epochs=1"),
        ({"loss__warmup_teacher_temp_epochs": 46}, "loss.warmup_teacher_temp_epochs=46 is longer"),
        ({"train__batch_size": 1438}, "train.batch_size=1438 is more than the 1437 training images"),
        ({"train__batch_size": 1}, "train.batch_size=1 with loss.use_bn=true"),
        ({"train__stop_after_steps": 1, "train__stop_after_epochs": 1}, "are both set"),
        ({"resume": "last", "fork": "last"}, "resume and fork are both set"),
    ],
)
def test_impossible_combinations(values, expected):
    assert expected in refusal(changed(**values))


def test_grey_digits_cannot_have_the_colour_augmentation():
    assert "augment=dino needs colour images" in refusal(mapping("augment=dino"))
    made = config("augment=dino", "data=synthetic", "loss=dino")
    assert isinstance(made.augment, DinoAugmentConfig)


def test_synthetic_data_needs_its_counts_and_bounds_the_batch():
    assert "data.num_samples is null" in refusal(mapping("data=synthetic", "data.num_samples=null"))
    assert "more than the 32 training images" in refusal(mapping("data=synthetic", "data.num_samples=32"))


def test_a_name_chooses_the_section():
    assert isinstance(config().optimizer, AdamWConfig)
    assert isinstance(config("optimizer=sgd").optimizer, SgdConfig)
    assert isinstance(config("optimizer=lars").optimizer, LarsConfig)


def test_no_section_can_be_made_wrong_not_even_by_hand():
    made = config()
    with pytest.raises(ConfigError, match=r"TrainConfig\.epochs: expected at least 1"):
        dataclasses.replace(made.train, epochs=0)
    with pytest.raises(ConfigError, match="expected a number, got 3"):
        dataclasses.replace(made.optimizer, lr=3)
    with pytest.raises(ConfigError, match="does not divide"):
        dataclasses.replace(made, model=dataclasses.replace(made.model, num_heads=3))


def test_the_fixed_names_exist():
    fixed = """
        seed resume fork train.epochs train.batch_size train.stop_after_steps train.stop_after_epochs
        train.precision optimizer.lr optimizer.scale_lr_to_batch checkpoint.save.every_epochs
        checkpoint.save.every_steps checkpoint.save.every_minutes checkpoint.keep.last checkpoint.keep.best
        checkpoint.keep.metric checkpoint.keep.mode checkpoint.keep.milestones checkpoint.storage.codec
        checkpoint.restore.max_lost_steps runtime.device runtime.workers runtime.threads
        runtime.deterministic paths.outputs run.variant run.tags run.note run.on_code_change
    """
    assert set(fixed.split()) <= set(known_keys())
