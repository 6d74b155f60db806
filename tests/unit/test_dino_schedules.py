import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dino_exp.dino.schedules import Schedules
from dino_exp.errors import ConfigError

PLAN = Schedules(
    name="cosine",
    num_epochs=10,
    steps_per_epoch=5,
    lr=1.25e-4,
    min_lr=1e-6,
    warmup_epochs=2,
    weight_decay=0.04,
    weight_decay_end=0.4,
    teacher_momentum=0.996,
    teacher_momentum_end=1.0,
    teacher_temp=0.07,
    warmup_teacher_temp=0.04,
    warmup_teacher_temp_epochs=3,
    freeze_last_layer_epochs=1,
)


def official_table(base, final, epochs, steps_per_epoch, warmup_epochs=0):
    num_warmup = warmup_epochs * steps_per_epoch
    warmup = np.linspace(0, base, num_warmup) if num_warmup else np.array([])
    steps = np.arange(epochs * steps_per_epoch - num_warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate((warmup, cosine)).tolist()


def test_golden_learning_rates():
    found = [PLAN.lr_at(step) for step in (0, 1, 9, 10, 11, 30, 49)]
    expected = [0, 1.3888888889e-5, 1.25e-4, 1.25e-4, 1.2480887469e-4, 6.3e-5, 1.1911253085e-6]
    assert found == pytest.approx(expected, abs=1e-14)


def test_golden_weight_decays():
    found = [PLAN.weight_decay_at(step) for step in (0, 1, 25, 49)]
    assert found == pytest.approx([0.04, 0.0403551889, 0.22, 0.3996448111], abs=1e-10)


def test_golden_momenta():
    found = [PLAN.teacher_momentum_at(step) for step in (0, 1, 25, 49)]
    assert found == pytest.approx([0.996, 0.9960039465, 0.998, 0.9999960535], abs=1e-10)


def test_golden_temperatures_change_with_the_epoch():
    found = [PLAN.teacher_temp_at(step) for step in range(50)]
    assert found == pytest.approx([0.04] * 5 + [0.055] * 5 + [0.07] * 40, abs=1e-12)


def test_last_layer_is_frozen_for_whole_epochs():
    assert [PLAN.last_layer_frozen_at(step) for step in (0, 4, 5, 49)] == [True, True, False, False]


@given(
    epochs=st.integers(1, 12),
    steps_per_epoch=st.integers(1, 7),
    data=st.data(),
    base=st.floats(1e-6, 1),
    final=st.floats(0, 1),
)
def test_every_step_equals_the_official_table(epochs, steps_per_epoch, data, base, final):
    warmup = data.draw(st.integers(0, epochs))
    plan = dataclasses.replace(
        PLAN,
        num_epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        lr=base,
        min_lr=final,
        warmup_epochs=warmup,
        warmup_teacher_temp_epochs=0,
    )
    table = official_table(base, final, epochs, steps_per_epoch, warmup)
    assert [plan.lr_at(step) for step in range(plan.num_steps)] == pytest.approx(table, abs=1e-15, rel=1e-12)
    assert len(table) == plan.num_steps


def test_constant_warms_up_and_then_stays():
    plan = dataclasses.replace(PLAN, name="constant")
    assert [plan.lr_at(step) for step in range(10)] == [PLAN.lr_at(step) for step in range(10)]
    assert {plan.lr_at(step) for step in range(10, 50)} == {1.25e-4}
    assert {plan.weight_decay_at(step) for step in range(50)} == {0.04}
    assert {plan.teacher_momentum_at(step) for step in range(50)} == {0.996}
    assert plan.teacher_temp_at(0) == 0.04
    assert plan.teacher_temp_at(49) == 0.07


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"warmup_epochs": 11}, "scheduler.warmup_epochs"),
        ({"warmup_epochs": -1}, "scheduler.warmup_epochs"),
        ({"warmup_teacher_temp_epochs": 11}, "loss.warmup_teacher_temp_epochs"),
        ({"num_epochs": 0}, "train.epochs"),
        ({"steps_per_epoch": 0}, "steps of an epoch"),
        ({"name": "linear"}, "scheduler.name"),
    ],
)
def test_impossible_schedules_are_refused_at_birth(change, key):
    with pytest.raises(ConfigError, match=key):
        dataclasses.replace(PLAN, **change)


@pytest.mark.parametrize("step", [-1, 50])
def test_a_step_outside_the_horizon_is_a_bug(step):
    with pytest.raises(ValueError, match="schedule"):
        PLAN.teacher_momentum_at(step)
