import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from config_examples import config, mapping

from dino_exp.config.check import config_from_mapping, known_keys
from dino_exp.config.compose import compose, touched_keys
from dino_exp.config.explain import conf_directory, group_choices
from dino_exp.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_mapping(compose(overrides))
    return str(caught.value)


def experiment_files() -> list[Path]:
    return sorted((conf_directory() / "experiment").glob("*.yaml"))


def recipe(name, *overrides):
    needed = () if name.startswith("digits") else ("data.root=images",)
    return config(f"experiment={name}", *needed, *overrides)


@pytest.mark.parametrize("name", group_choices()["experiment"])
def test_every_experiment_composes_also_at_debug_size(name):
    recipe(name)
    step = recipe(name, "debug=step")
    assert (step.train.epochs, step.train.stop_after_steps) == (1, 1)


@pytest.mark.parametrize("path", experiment_files(), ids=lambda path: path.stem)
def test_an_experiment_tells_its_command_and_sets_no_architecture(path):
    text = path.read_text()
    comments = [line for line in text.splitlines() if line.startswith("# ")]
    assert comments[0] == "# @package _global_"
    labels = [line.split(":")[0] for line in comments[1:] if re.match(r"# (Command|Time|Result): ", line)]
    assert labels == ["# Command", "# Time", "# Result"]
    assert f"experiment={path.stem}" in comments[1] or path.stem == "digits"
    stated = yaml.safe_load(text)
    assert not {"model", "data", "augment"} & stated.keys()
    temperatures = {"teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs"}
    assert stated.get("loss", {}).keys() <= temperatures


@pytest.mark.parametrize("name", [name for name in group_choices()["experiment"] if name.startswith("imagenet")])
def test_model_patches_and_head_of_the_command_line_win_over_an_imagenet_recipe(name):
    made = recipe(name, "model=vit_t", "data=imagenet", "data.patch_size=32", "loss=dino", "augment=dino")
    assert (made.model.embed_dim, made.data.patch_size, made.augment.num_local_crops) == (192, 32, 8)
    assert (made.loss.out_dim, made.loss.norm_last_layer) == (65536, True)


def test_one_gpu_does_what_eight_do():
    one, eight = recipe("imagenet_one_gpu"), recipe("imagenet_vit_s16")
    assert one.train.batch_size // one.train.accumulate == 64
    assert replace(one.train, accumulate=1) == eight.train
    same = ("model", "data", "augment", "loss", "optimizer", "scheduler", "init", "evaluation")
    assert [getattr(one, name) for name in same] == [getattr(eight, name) for name in same]


def test_the_boosted_recipe_is_that_of_the_official_readme():
    boosted, vanilla = recipe("imagenet_vit_s16_boosted"), recipe("imagenet_vit_s16")
    assert (boosted.train.epochs, boosted.train.batch_size, boosted.loss.norm_last_layer) == (300, 1024, False)
    assert (boosted.loss.warmup_teacher_temp, boosted.loss.teacher_temp) == (0.04, 0.07)
    assert boosted.loss.warmup_teacher_temp_epochs == 30
    assert (boosted.optimizer, boosted.scheduler, boosted.augment) == (
        vanilla.optimizer,
        vanilla.scheduler,
        vanilla.augment,
    )


CHOICES = [
    (group, choice)
    for group, choices in group_choices().items()
    for choice in choices
    if group not in ("augment", "loss")
]


NEEDED = {name: ["augment=dino"] for name in ("cifar10", "cifar100")}
NEEDED |= {name: ["augment=dino", "data.root=images"] for name in ("folder", "imagenet", "imagenet_p8")}
NEEDED |= {name: ["data.root=images"] for name in group_choices()["experiment"] if not name.startswith("digits")}


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_works_beside_the_defaults(group, choice):
    made = mapping(f"{group}={choice}", *NEEDED.get(choice, []))
    config_from_mapping(made)
    label = made.get(group, {}).get("name", choice)
    assert label == choice.removesuffix("_p8")  # the same data set in other patches


def test_the_architecture_of_the_command_line_wins_over_the_experiment():
    made = config("checkpoint=rotating", "model=vit_s", "experiment=digits")
    assert (made.model.embed_dim, made.model.depth, made.model.num_heads) == (384, 12, 6)
    assert made.train.epochs == 45


def test_the_paper_recipe_needs_no_experiment_values():
    made = config("~experiment", "data=synthetic", "augment=dino", "loss=dino", "model=vit_s")
    assert (made.loss.out_dim, made.loss.use_bn, made.init.scheme) == (65536, False, "official")
    assert (made.optimizer.lr, made.optimizer.scale_lr_to_batch, made.optimizer.weight_decay_end) == (
        5e-4,
        256,
        0.4,
    )
    assert (made.scheduler.warmup_epochs, made.scheduler.min_lr, made.scheduler.teacher_momentum) == (
        10,
        1e-6,
        0.996,
    )
    assert (made.augment.num_local_crops, made.augment.local_area) == (8, (0.05, 0.4))


def test_conf_states_exactly_the_settings_of_the_schema():
    stated = set()
    for overrides in [(), ("optimizer=sgd",), ("optimizer=lars",), ("augment=dino",), ("data=folder",)]:
        stated |= {key for key in known_keys() if _has(mapping(*overrides), key)}
    assert stated == set(known_keys())


def _has(plain: object, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(plain, dict) or part not in plain:
            return False
        plain = plain[part]
    return True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lrr=1", "lrr: there is no such setting; did you mean optimizer.lr?"),
        ("optimzer.lr=1", "optimzer.lr: there is no such setting; did you mean optimizer.lr?"),
        ("mdel=vit_s", "mdel: there is no such setting; did you mean model?"),
        ("expriment=digits", "expriment: there is no such setting; did you mean experiment?"),
        ("+foo=1", "foo: there is no such setting"),
        ("~foo", "foo: there is no such setting"),
        ("~optimizer.lr", "optimizer.lr: no value is given; add optimizer.lr=<value>"),
        (
            "model=vit_x",
            "model=vit_x: there is no such choice; there are vit_b, vit_l, vit_nano, vit_s, vit_t",
        ),
        ("experiment=digit", "did you mean digits?"),
        ("train.epochs=abc", "train.epochs: expected a whole number, got 'abc'"),
        ("optimizer.lr=[", "cannot read the override 'optimizer.lr=['"),
        ("train.epochs", "cannot read the override 'train.epochs'"),
        ("seed=0,1", "add --multirun to your command line"),
        ("experiment=null", "configuration: experiment=null: expected one of cifar10_vit_t, digits, "),
        ("+model=3", "configuration: +model=3: expected one of vit_b, vit_l, vit_nano, vit_s, vit_t"),
        ("model={a: 1}", "configuration: model: expected one of vit_b, vit_l, vit_nano, vit_s, vit_t"),
        ("optimizer.lr=${no.such}", "optimizer.lr"),
    ],
)
def test_a_wrong_override_gets_one_message(override, message):
    assert message in refusal(override)


@pytest.mark.parametrize(
    "overrides",
    [
        ["scheduler.min_lr=${now:%S}"],
        ["seed=${oc.env:SLURM_JOB_ID}"],
        ["optimizer.betas=[0.9,'${now:0.%S}']"],
        ["run.note=${now:%S}", "scheduler.min_lr=${run.note}"],
        ["run.note='%S'", "seed='${oc.decode:${now:${run.note}}}'"],
        ["run.note='${now:%S}'", "scheduler.min_lr='${..run.note}'"],
        ["run.note='${now:%S}'", "run.variant=note", "seed='${run.${run.variant}}'"],
        ["run.tags=['${now:%S}']", "init.weights_digest='${run.tags[0]}'"],
    ],
)
def test_identity_from_the_clock_or_the_machine_is_refused(overrides):
    assert "depends on the machine or the clock" in refusal(*overrides)


def test_settings_may_refer_to_settings_and_notes_to_the_clock():
    assert config("train.epochs=${train.batch_size}").train.epochs == 64
    assert config("optimizer.lr=${.weight_decay}").optimizer.lr == config().optimizer.weight_decay
    assert config("run.note=weight_decay", "optimizer.lr='${optimizer.${run.note}}'").optimizer.lr > 0
    assert config("run.note=${now:%Y}").run.note.isdigit()


def test_touched_keys_of_values_and_groups():
    assert touched_keys([]) == frozenset()
    assert touched_keys(["seed=1", "++optimizer.lr=2", "hydra.verbose=true"]) == {"seed", "optimizer.lr"}
    save = touched_keys(["checkpoint.save={every_epochs: 3}"])
    assert save == {key for key in known_keys() if key.startswith("checkpoint.save.")}
    model = touched_keys(["model=vit_nano"])
    assert model == {key for key in known_keys() if key.startswith("model.")}


def test_touched_keys_of_presets_are_what_they_state_and_what_they_change():
    touched = touched_keys(["debug=step"])
    assert {"train.epochs", "train.stop_after_steps", "runtime.workers"} <= touched
    assert "seed" not in touched
    smoke = touched_keys(["experiment=digits_smoke"])
    assert {"checkpoint.keep.milestones", "train.epochs", "optimizer.clip_grad"} <= smoke
    assert "model.depth" not in smoke


def test_touched_keys_of_nonsense_is_a_configuration_error():
    with pytest.raises(ConfigError, match="cannot read the override"):
        touched_keys(["a=["])


def test_composing_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose(["model=vit_s"])
    assert list(tmp_path.iterdir()) == []


def test_composing_does_not_need_torch():
    import subprocess

    code = "import sys, dino_exp.config.compose as c; c.compose(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=conf_directory().parent).returncode == 0
