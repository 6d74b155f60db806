import pytest
from config_examples import config, mapping

from dino_exp.config.check import asked_from_mapping, known_keys
from dino_exp.config.compare import ABSENT, as_mapping, compare, overlay, roles_by_key
from dino_exp.errors import ConfigError


def verdicts(*overrides: str) -> dict[str, str]:
    return {change.key: change.verdict for change in compare(config(), config(*overrides), known_keys())}


@pytest.mark.parametrize(
    ("override", "verdict"),
    [
        ("optimizer.lr=1e-2", "refused"),
        ("seed=1", "refused"),
        ("train.epochs=90", "refused"),
        ("runtime.threads=2", "warned"),
        ("runtime.device=cpu", "warned"),
        ("runtime.deterministic=false", "warned"),
        ("evaluation.batch_size=100", "warned"),
        ("train.stop_after_epochs=3", "allowed"),
        ("evaluation.every_epochs=1", "allowed"),
        ("logger.every_steps=1", "allowed"),
        ("runtime.workers=2", "allowed"),
        ("checkpoint.keep.last=9", "allowed"),
        ("run.note=hi", "allowed"),
    ],
)
def test_the_verdict_follows_the_role(override, verdict):
    assert verdicts(override) == {override.partition("=")[0]: verdict}


def test_equal_settings_and_places_are_no_changes():
    assert verdicts() == {}
    assert verdicts("optimizer.lr=3e-3") == {}
    assert verdicts("paths.outputs=/elsewhere", "resume=last") == {}


def test_only_touched_keys_count():
    now = config("optimizer.lr=1", "train.stop_after_epochs=3")
    (change,) = compare(config(), now, {"train.stop_after_epochs"})
    assert (change.key, change.was, change.now, change.role) == ("train.stop_after_epochs", None, 3, "budget")


def test_another_choice_shows_the_keys_that_come_and_go():
    changes = {change.key: change for change in compare(config(), config("optimizer=sgd"), known_keys())}
    assert (changes["optimizer.betas"].was, changes["optimizer.betas"].now) == ((0.9, 0.999), ABSENT)
    assert (changes["optimizer.momentum"].was, changes["optimizer.momentum"].now) == (ABSENT, 0.9)
    assert changes["optimizer.name"].verdict == "refused"


def test_overlay_takes_touched_settings_but_never_places():
    now = config("train.stop_after_epochs=3", "optimizer.lr=1", "paths.outputs=/x", "runtime.workers=2")
    merged = overlay(config(), now, {"train.stop_after_epochs", "optimizer.lr", "paths.outputs"})
    assert as_mapping(merged) == as_mapping(config("train.stop_after_epochs=3", "optimizer.lr=1"))


def test_overlay_takes_a_section_over_whole_when_its_choice_is_touched():
    now = config("optimizer=sgd")
    merged = overlay(config("optimizer.eps=1e-4"), now, {"optimizer.name", "optimizer.momentum"})
    assert as_mapping(merged)["optimizer"] == as_mapping(now)["optimizer"]


@pytest.mark.parametrize(
    ("of_run", "label"),
    [
        (["loss.teacher_temp=0.06", "loss.warmup_teacher_temp=0.06"], "loss.name=mine"),
        (["checkpoint=every_epoch"], "checkpoint.name=mine"),
        (["model=vit_t"], "model.name=mine"),
        (["optimizer=sgd", "optimizer.momentum=0.5"], "optimizer.name=sgd"),
    ],
)
def test_a_label_alone_changes_nothing_else_of_its_section(of_run, label):
    key, _, value = label.partition("=")
    kind = [word for word in of_run if word.startswith("optimizer=")]
    merged = overlay(config(*of_run), config(*kind, label), {key})
    section, _, name = key.partition(".")
    expected = as_mapping(config(*of_run))
    expected[section][name] = value
    assert as_mapping(merged) == expected


def test_threads_that_are_not_given_stay_as_they_were():
    assert compare(config("runtime.threads=1"), config(), known_keys()) == []
    assert [c.verdict for c in compare(config(), config("runtime.threads=1"), known_keys())] == ["warned"]


def test_what_a_command_leaves_out_is_not_checked_against_defaults():
    words = ("scheduler.warmup_epochs=60",)
    with pytest.raises(ConfigError, match="longer than"):
        config(*words)
    asked = asked_from_mapping(mapping(*words))
    long = config("train.epochs=100")
    assert overlay(long, asked, {"scheduler.warmup_epochs"}).scheduler.warmup_epochs == 60
    with pytest.raises(ConfigError, match=r"scheduler\.warmup_epochs=60 is longer than train\.epochs=50"):
        overlay(config("train.epochs=50"), asked, {"scheduler.warmup_epochs"})
    with pytest.raises(ConfigError, match="expected a whole number"):
        asked_from_mapping(mapping("scheduler.warmup_epochs=soon"))


def test_overlay_refuses_what_is_impossible_together():
    with pytest.raises(ConfigError, match=r"stop_after_steps and train\.stop_after_epochs are both set"):
        overlay(
            config("train.stop_after_steps=3"),
            config("train.stop_after_epochs=1"),
            ["train.stop_after_epochs"],
        )


def test_roles_of_the_whole_schema():
    roles = roles_by_key()
    assert set(roles) == set(known_keys())
    assert {key for key, role in roles.items() if role == "numerics"} == {
        "evaluation.batch_size",
        "runtime.device",
        "runtime.threads",
        "runtime.deterministic",
        "runtime.compile",
        "runtime.tf32",
        "runtime.gradient_checkpointing",
        "runtime.parallel",
    }
    assert all(role == "runtime" for key, role in roles.items() if key.startswith(("checkpoint.", "run.", "paths.")))
    assert all(role == "identity" for key, role in roles.items() if key.startswith(("optimizer.", "augment.")))
