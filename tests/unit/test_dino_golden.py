"""Values of the official code in float64, to 1e-9: successive calls of the loss. Nine steps: test_training_step.py."""

import torch
from support.golden import GOLDEN, exactly, waves

from dino_exp.dino.loss import dino_loss, updated_center


def test_successive_loss_calls():
    student, teacher = waves(24, 8, 0.2).view(6, 4, 8), waves(8, 8, 1.1).view(2, 4, 8)
    center = torch.zeros(1, 8, dtype=torch.float64)
    losses, centers = [], []
    for teacher_temp in (0.04, 0.07, 0.07):  # epochs 0, 2 and 5 of a warm-up over 3
        terms = dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=teacher_temp)
        center = updated_center(center, teacher, 0.9)
        losses.append(terms.loss.item())
        centers.append(center)
    assert losses == exactly(GOLDEN["loss_calls"]["values"])
    assert centers[0][0, :4].tolist() == exactly(GOLDEN["loss_calls"]["centre_first4_after_call_1"])
