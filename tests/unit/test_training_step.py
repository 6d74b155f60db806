"""One step: the official code's numbers, and a transaction."""

import copy
import dataclasses
import math

import pytest
import torch
from support.golden import BATCH, NUM_PROTOTYPES, A, B, exactly, formula_model, images
from torch import nn

from dino_exp.data.images import Images
from dino_exp.data.loader import Batch
from dino_exp.dino.optim import build_optimizer
from dino_exp.dino.scaling import LossScaler
from dino_exp.dino.schedules import Schedules
from dino_exp.errors import CheckpointError
from dino_exp.training.state import TrainState
from dino_exp.training.step import StepRule, train_step
from dino_exp.training.verdict import NonFiniteError, settle

SCHEDULES = Schedules(
    name="cosine",
    num_epochs=3,
    steps_per_epoch=3,
    lr=0.001,
    min_lr=1e-6,
    warmup_epochs=1,
    weight_decay=0.04,
    weight_decay_end=0.4,
    teacher_momentum=0.9,
    teacher_momentum_end=1.0,
    teacher_temp=0.07,
    warmup_teacher_temp=0.04,
    warmup_teacher_temp_epochs=2,
    freeze_last_layer_epochs=1,
)
RULE = StepRule(
    seed=0,
    batch_size=BATCH,
    student_temp=0.1,
    center_momentum=0.9,
    drop_path_rate=0.0,
    depth=2,
    clip_grad=0.05,
    precision="fp32",
)


def replace_rule(**changes) -> StepRule:
    return dataclasses.replace(RULE, **changes)


def formula_state(*, norm_last_layer=True, fused=True, name="adamw") -> TrainState:
    student = formula_model(norm_last_layer=norm_last_layer)
    teacher = formula_model(norm_last_layer=True).requires_grad_(False)
    optimizer = build_optimizer(name, student, fused=fused)
    return TrainState(student, teacher, optimizer, torch.zeros(1, NUM_PROTOTYPES, dtype=torch.float64))


def batch_of(step: int) -> Batch:
    return Batch(
        step=step,
        epoch=(step - 1) // 3,
        sample_ids_B=torch.arange(BATCH),
        images=Images.whole(torch.zeros(BATCH, 3, 1, 1, dtype=torch.uint8)),
    )


def step_once(state: TrainState, step: int, *, rule=RULE, scale_crops=1.0, **kwargs):
    def crops(images_BCHW, sample_ids_B, epoch):
        index = step - 1
        made = [images(BATCH, 32, 0.1 + index), images(BATCH, 32, 0.7 + index)]
        made += [images(BATCH, 16, 0.3 * local + index) for local in range(3)]
        return [scale_crops * crop for crop in made]

    return train_step(
        state, batch_of(step), augment=kwargs.pop("augment", crops), schedules=SCHEDULES, rule=rule, **kwargs
    )


def losses_of(state: TrainState) -> list[float]:
    return [step_once(state, step, want_health=step % 2 == 0).loss for step in range(1, 10)]


def abs_sum(model: nn.Module) -> float:
    return sum(parameter.abs().sum().item() for parameter in model.parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_nine_steps_with_prototypes_of_length_one(fused):
    state = formula_state(fused=fused)
    assert losses_of(state) == exactly(A["losses"])
    assert state.center_1K.sum().item() == exactly(A["center_sum"])
    assert state.center_1K.abs().sum().item() == exactly(A["center_abs_sum"])
    with torch.no_grad():
        cls = state.teacher.backbone(images(2, 32, 0.5))
    assert cls[0, :4].tolist() == exactly(A["teacher_cls_row0_first4"])
    assert abs_sum(state.student) == exactly(A["student_abs_sum"])
    assert abs_sum(state.teacher) == exactly(A["teacher_abs_sum"])


def test_nine_steps_with_free_prototypes():
    assert losses_of(formula_state(norm_last_layer=False)) == exactly(B["losses"])


def test_golden_losses_notice_a_missing_freeze(monkeypatch):
    monkeypatch.setattr(Schedules, "last_layer_frozen_at", lambda self, step: False)
    assert not math.isclose(losses_of(formula_state())[-1], A["losses"][-1], abs_tol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_state_round_trip_continues_to_the_same_bits(name):
    straight, stopped = formula_state(name=name), formula_state(name=name)
    losses = losses_of(straight)
    for step in range(1, 5):
        step_once(stopped, step)
    saved = copy.deepcopy(stopped.state_dict())
    resumed = formula_state(name=name)
    resumed.load_state_dict(saved)
    assert resumed.step == 4
    assert [step_once(resumed, step).loss for step in range(5, 10)] == losses[4:]
    assert_same_state(resumed, straight)


def assert_same_state(one: TrainState, other: TrainState) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def test_a_frozen_last_layer_has_no_moments():
    state = formula_state(norm_last_layer=False)
    step_once(state, 1)
    names = [name for name in state.state_dict() if name.startswith("optimizer.")]
    assert names
    assert not any("last_layer" in name for name in names)
    step_once(state, 2), step_once(state, 3), step_once(state, 4)
    assert "optimizer.head.last_layer.weight_v.exp_avg" in state.state_dict()


@pytest.mark.parametrize(
    ("change", "text", "torn"),
    [
        (lambda flat: flat.pop("teacher.backbone.cls_token"), "teacher.backbone.cls_token", False),
        (lambda flat: flat.update({"student.extra": torch.zeros(1)}), "student.extra", False),
        (lambda flat: flat.update({"loss.center": torch.zeros(1, 3)}), "loss.center", True),
        (lambda flat: flat.update({"loss.center": torch.zeros(1, NUM_PROTOTYPES)}), "float32", True),
    ],
)
def test_another_models_state_is_refused(change, text, torn):
    state = formula_state()
    step_once(state, 1)
    flat = copy.deepcopy(state.state_dict())
    before = copy.deepcopy(state)
    change(flat)
    with pytest.raises(CheckpointError, match=text):
        state.load_state_dict(flat)
    assert state.torn == torn
    if not torn:
        assert_same_state(state, before)


class Failing(nn.Module):
    """A head with batch norm that raises after the norm has moved its statistics."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm, self.failing = inner, nn.BatchNorm1d(32, dtype=torch.float64), False

    def forward(self, features):
        normed = self.norm(features.flatten(0, -2)).view_as(features)
        if self.failing:
            raise MemoryError("out of memory")
        return self.inner(normed)


def failing_state() -> TrainState:
    student = formula_model(norm_last_layer=True)
    student.head = Failing(student.head)
    teacher = copy.deepcopy(student).requires_grad_(False)
    center = torch.zeros(1, NUM_PROTOTYPES, dtype=torch.float64)
    return TrainState(student, teacher, build_optimizer("adamw", student), center)


def test_an_exception_in_the_forward_pass_leaves_the_last_completed_step():
    state = failing_state()
    step_once(state, 1)
    before = copy.deepcopy(state)
    state.student.head.failing = True
    with pytest.raises(MemoryError):
        step_once(state, 2)
    assert_same_state(state, before)
    assert not state.torn
    state.student.head.failing = False
    straight = failing_state()
    step_once(straight, 1)
    assert step_once(state, 2).loss == step_once(straight, 2).loss
    assert_same_state(state, straight)


def test_a_non_finite_loss_leaves_the_last_completed_step():
    state = failing_state()
    step_once(state, 1)
    before = copy.deepcopy(state)

    def poisoned(images_BCHW, sample_ids_B, epoch):
        return [torch.full((BATCH, 3, 32, 32), math.nan, dtype=torch.float64)] * 2

    with pytest.raises(NonFiniteError, match="step 2: the loss"):
        step_once(state, 2, augment=poisoned)
    assert_same_state(state, before)


def test_a_non_finite_gradient_leaves_the_last_completed_step():
    state = formula_state()
    step_once(state, 1)
    before = copy.deepcopy(state)
    handle = state.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match="step 2: the gradient"):
        step_once(state, 2)
    handle.remove()
    assert_same_state(state, before)


def ahead(num_steps: int, rule: StepRule = RULE) -> StepRule:
    return dataclasses.replace(rule, read_every=num_steps)


def test_a_host_that_asks_late_trains_the_same() -> None:
    state, straight = formula_state(), formula_state()
    for step in range(1, 10):
        measured = step_once(state, step, rule=ahead(4), want_health=step == 9)
        assert (measured.loss is None) == (step not in (4, 8, 9))
    losses = losses_of(straight)
    assert state.loss_sum == pytest.approx(sum(losses), rel=1e-12)
    assert (state.loss_count, state.unread) == (9, [])
    ours, theirs = state.state_dict(), straight.state_dict()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("what", ["the loss", "the gradient"])
def test_a_host_that_asks_late_finds_the_last_good_step(what: str) -> None:
    """Whatever was computed after the step that does not count has changed nothing."""
    state, straight = failing_state(), failing_state()
    for step in range(1, 4):
        step_once(straight, step, rule=ahead(9))
    settle(straight)
    for step in range(1, 9):
        bad = step == 4
        handle = state.student.backbone.cls_token.register_hook(
            lambda gradient, bad=bad: gradient * (math.inf if bad and what == "the gradient" else 1.0)
        )
        step_once(state, step, rule=ahead(99), scale_crops=math.nan if bad and what == "the loss" else 1.0)
        handle.remove()
    assert state.step == 8
    with pytest.raises(NonFiniteError, match=f"step 4: {what}"):
        settle(state)
    assert_same_state(state, straight)
    assert state.step == 3
    assert not state.torn


def test_an_exception_before_the_update_leaves_no_loss_behind() -> None:
    state = formula_state()
    step_once(state, 1)
    before = copy.deepcopy(state)

    def failing() -> None:
        raise OSError("the last save failed")

    for rule in (RULE, ahead(9)):
        with pytest.raises(OSError, match="the last save failed"):
            step_once(state, 2, rule=rule, before_update=failing)
        settle(state)
        assert_same_state(state, before)


def scaled_state() -> TrainState:
    state = formula_state()
    state.scaler = LossScaler(torch.device("cpu"))
    return state


def test_the_scale_of_the_loss_changes_no_number_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dino_exp.dino.scaling.GROWTH_STEPS", 4)
    state, straight = scaled_state(), formula_state()
    assert losses_of(state) == pytest.approx(losses_of(straight), rel=1e-9)
    assert state.scaler is not None
    assert (float(state.scaler.scale), float(state.scaler.good_steps)) == (4 * 65536.0, 1.0)


@pytest.mark.parametrize("read_every", [1, 9])
def test_an_overflow_costs_the_update_of_the_student_and_half_of_the_scale(read_every: int) -> None:
    state = scaled_state()
    for step in (1, 2):
        step_once(state, step, rule=ahead(read_every))
    settle(state)
    before = copy.deepcopy(state)
    handle = state.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    step_once(state, 3, rule=ahead(read_every))
    settle(state)
    handle.remove()
    now, then = state.state_dict(), before.state_dict()
    same = {name for name, value in now.items() if isinstance(value, torch.Tensor) and torch.equal(value, then[name])}
    assert {name for name in now if name.startswith(("student.", "optimizer."))} <= same
    assert not {name for name in now if name.startswith("teacher.") and "norm" not in name} <= same
    assert "loss.center" not in same
    assert (float(now["loss.scale"]), float(now["loss.good_steps"]), state.step) == (32768.0, 0.0, 3)


@pytest.mark.parametrize("read_every", [1, 9])
def test_moments_of_an_overflow_stay_when_a_later_step_does_not_count(read_every: int) -> None:
    """Those that only the step which does not count has made go with it."""
    state = scaled_state()
    handle = state.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    step_once(state, 3, rule=ahead(read_every))  # of the last epoch of the freeze
    handle.remove()
    before = {name for name in state.state_dict() if name.startswith("optimizer.")}

    def poisoned_steps() -> None:
        step_once(state, 4, rule=ahead(read_every), scale_crops=math.nan)
        step_once(state, 5, rule=ahead(read_every))
        settle(state)

    with pytest.raises(NonFiniteError, match="step 4: the loss"):
        poisoned_steps()
    assert {name for name in state.state_dict() if name.startswith("optimizer.")} == before
    assert before
    assert not any("last_layer" in name for name in before)


def test_gradients_that_overflow_at_any_scale_are_an_error() -> None:
    state = scaled_state()
    assert state.scaler is not None
    state.scaler.scale.fill_(2.0)
    state.student.backbone.cls_token.register_hook(lambda gradient: gradient * math.inf)
    step_once(state, 1)
    step_once(state, 2)
    with pytest.raises(NonFiniteError, match=r"step 3: the gradient's norm at a loss scale of 0\.5"):
        step_once(state, 3)


def test_the_scale_is_part_of_the_state() -> None:
    straight, stopped = scaled_state(), scaled_state()
    losses = losses_of(straight)
    for step in range(1, 5):
        step_once(stopped, step)
    resumed = scaled_state()
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert [step_once(resumed, step).loss for step in range(5, 10)] == losses[4:]
    assert_same_state(resumed, straight)


def test_an_exception_during_the_update_says_that_the_state_is_torn(monkeypatch):
    state = formula_state()
    step_once(state, 1)

    def failing(*_):
        raise RuntimeError("device lost")

    monkeypatch.setattr("dino_exp.training.step.ema_update_", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        step_once(state, 2)
    assert state.torn


def test_the_update_ratio_is_that_of_the_parameters():
    state = formula_state()
    before = [parameter.detach().clone() for parameter in state.student.parameters()]
    ratio = step_once(state, 1, want_health=True).update_ratio
    after = list(state.student.parameters())
    moved = math.sqrt(sum(float((new.detach() - old).square().sum()) for new, old in zip(after, before, strict=True)))
    size = math.sqrt(sum(float(old.square().sum()) for old in before))
    assert ratio == pytest.approx(moved / size, rel=1e-12)
