import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dino_exp.dino.loss import dino_loss, updated_center


def pairwise(student, teacher, center, student_temp, teacher_temp):
    """Equation 3 of the paper, written out pair by pair."""
    targets = ((teacher - center) / teacher_temp).softmax(-1)
    terms = [
        -(target * functional.log_softmax(view / student_temp, -1)).sum(-1).mean()
        for i, target in enumerate(targets)
        for v, view in enumerate(student)
        if v != i
    ]
    return sum(terms) / len(terms)


def batch(views, targets, images, prototypes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.rand(views, images, prototypes, generator=generator, dtype=dtype) * 2 - 1
    teacher = torch.rand(targets, images, prototypes, generator=generator, dtype=dtype) * 2 - 1
    center = torch.rand(1, prototypes, generator=generator, dtype=dtype) * 0.1
    return student.requires_grad_(), teacher, center


@settings(deadline=None)
@given(
    targets=st.integers(1, 3),
    locals_=st.integers(0, 5),
    images=st.integers(1, 4),
    prototypes=st.integers(2, 9),
    student_temp=st.floats(0.05, 1.0),
    teacher_temp=st.floats(0.02, 0.1),
)
def test_loss_and_gradient_equal_the_pairwise_form(targets, locals_, images, prototypes, student_temp, teacher_temp):
    views = max(targets + locals_, 2)
    student, teacher, center = batch(views, targets, images, prototypes)
    fast = dino_loss(student, teacher, center, student_temp=student_temp, teacher_temp=teacher_temp).loss
    plain = pairwise(student, teacher, center, student_temp, teacher_temp)
    (fast_gradient,) = torch.autograd.grad(fast, student)
    (plain_gradient,) = torch.autograd.grad(plain, student)
    assert fast.item() == pytest.approx(plain.item(), rel=1e-11)
    torch.testing.assert_close(fast_gradient, plain_gradient, rtol=1e-10, atol=1e-12)


def test_float32_form_is_as_precise_as_the_pairwise_form():
    student, teacher, center = batch(10, 2, 8, 4096, dtype=torch.float32)
    temps = {"student_temp": 0.1, "teacher_temp": 0.04}
    exact = dino_loss(student.double(), teacher.double(), center.double(), **temps).loss.item()
    fast = dino_loss(student, teacher, center, **temps).loss.item()
    plain = pairwise(student, teacher, center, 0.1, 0.04).item()
    assert fast == pytest.approx(exact, rel=2e-6)
    assert plain == pytest.approx(exact, rel=2e-6)


def test_half_precision_logits_are_reduced_in_float32():
    student, teacher, center = batch(6, 2, 4, 64, dtype=torch.float32)
    student, teacher = student.detach().bfloat16(), teacher.bfloat16()
    terms = dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04)
    wide = dino_loss(student.float(), teacher.float(), center, student_temp=0.1, teacher_temp=0.04)
    assert terms.loss.dtype == terms.teacher_probs_TBK.dtype == torch.float32
    assert terms.loss.item() == wide.loss.item()
    assert updated_center(center, teacher, 0.9).dtype == torch.float32


def test_no_gradient_reaches_the_teacher_or_the_centre():
    student, teacher, center = batch(4, 2, 3, 5)
    teacher.requires_grad_()
    terms = dino_loss(student, teacher, center.requires_grad_(), student_temp=0.1, teacher_temp=0.04)
    terms.loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert center.grad is None


def test_teacher_logits_may_come_from_inference_mode():
    student, teacher, center = batch(4, 2, 3, 5)
    with torch.inference_mode():
        logits = teacher * 1.0
    terms = dino_loss(student, logits, center, student_temp=0.1, teacher_temp=0.04)
    terms.loss.backward()
    assert torch.isfinite(student.grad).all()
    assert not updated_center(center, logits, 0.9).is_inference()


def test_uniform_outputs_cost_ln_k():
    terms = dino_loss(
        torch.zeros(6, 4, 128),
        torch.zeros(2, 4, 128),
        torch.zeros(1, 128),
        student_temp=0.1,
        teacher_temp=0.04,
    )
    assert terms.loss.item() == pytest.approx(math.log(128))


def test_centre_follows_the_mean_of_the_raw_logits_and_leaves_the_old_one_alone():
    _, teacher, center = batch(2, 2, 3, 5)
    before = center.clone()
    after = updated_center(center, teacher, 0.9)
    torch.testing.assert_close(after, 0.9 * before + 0.1 * teacher.mean((0, 1))[None])
    assert torch.equal(center, before)
