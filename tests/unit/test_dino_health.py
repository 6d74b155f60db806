import math

import pytest
import torch

from dino_exp.dino.collapse import collapse_kind, describe_collapse
from dino_exp.dino.health import Outputs, feature_std, measure_health
from dino_exp.dino.loss import dino_loss

K = 128


def health(student, teacher, *, features=None, student_features=None, center=None, temp=0.04):
    center = torch.zeros(1, K, dtype=torch.float64) if center is None else center
    terms = dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=temp)
    features = torch.randn(2, student.shape[1], 16) if features is None else features
    student_features = torch.randn(len(student), student.shape[1], 16) if student_features is None else student_features
    outputs = Outputs.of(terms.teacher_probs_TBK, student_features, features)
    return measure_health(outputs, loss=terms.loss, center_1K=center)


def logits(views, images=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(views, images, K, generator=generator, dtype=torch.float64) * 0.3


def test_kl_equals_the_pairwise_divergence():
    student, teacher = logits(5), logits(2, seed=1)
    targets, views = (teacher / 0.04).softmax(-1), (student / 0.1).log_softmax(-1)
    pairs = [
        (target * (target.log() - views[v])).nansum(-1).mean()
        for i, target in enumerate(targets)
        for v in range(5)
        if v != i
    ]
    found = health(student, teacher)
    assert found.kl == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-6)
    entropy = -(targets * targets.log()).nansum(-1).mean().item()
    assert found.entropy_ratio == pytest.approx(entropy / math.log(K), rel=1e-6)


def test_prototypes_used_is_the_share_of_first_choices_after_centring():
    teacher = torch.zeros(2, 32, K, dtype=torch.float64)
    teacher[..., 3] = 1.0
    teacher[0, 5, 3], teacher[0, 5, 77] = 0.0, 1.0
    assert health(logits(4), teacher).prototypes_used == pytest.approx(2 / K)
    center = torch.zeros(1, K, dtype=torch.float64)
    center[0, 3], center[0, 0] = 5.0, -5.0
    assert health(logits(4), teacher, center=center).prototypes_used == pytest.approx(1 / K)


def test_features():
    same = torch.ones(2, 32, 16)
    found = health(logits(4), logits(2), features=same, student_features=torch.cat((same, -same)))
    assert found.feature_std == pytest.approx(0.0, abs=1e-6)
    assert found.student_feature_std == pytest.approx(0.0, abs=1e-6)
    assert found.student_teacher_cosine == pytest.approx(1.0)
    found = health(logits(4), logits(2), features=same, student_features=-torch.cat((same, same)))
    assert found.student_teacher_cosine == pytest.approx(-1.0)


def test_isotropic_features_have_a_std_of_one_at_any_length():
    features = torch.randn(4, 2000, 64, generator=torch.Generator().manual_seed(0)) * 37
    assert feature_std(features).item() == pytest.approx(1.0, abs=0.01)


def test_centre_norm():
    center = torch.zeros(1, K, dtype=torch.float64)
    center[0, :2] = torch.tensor([3.0, 4.0])
    assert health(logits(4), logits(2), center=center).center_norm == pytest.approx(5.0)


def test_uniform_outputs_are_a_uniform_collapse():
    flat = torch.zeros(6, 32, K, dtype=torch.float64)
    found = health(flat, flat[:2])
    assert found.kl == pytest.approx(0.0, abs=1e-9)
    assert collapse_kind(found.entropy_ratio, found.kl) == "uniform"


def test_one_prototype_for_all_is_a_dominance_collapse():
    peaked = torch.zeros(6, 32, K, dtype=torch.float64)
    peaked[..., 9] = 2.0
    found = health(peaked, peaked[:2])
    assert collapse_kind(found.entropy_ratio, found.kl) == "dominance"
    assert found.prototypes_used == pytest.approx(1 / K)


@pytest.mark.parametrize(
    ("ratio", "kl", "kind"),
    [
        (0.999, 0.002, "uniform"),
        (0.971, 0.099, "uniform"),
        (0.969, 0.04, None),
        (0.999, 0.1, None),
        (0.14, 0.03, "dominance"),
        (0.499, 0.099, "dominance"),
        (0.501, 0.03, None),
        (0.14, 0.1, None),
        (0.09, 0.5, None),
        (math.nan, math.nan, None),
    ],
)
def test_thresholds_of_both_collapses(ratio, kl, kind):
    assert collapse_kind(ratio, kl) == kind


@pytest.mark.parametrize(
    ("kind", "advice"), [("uniform", "lower loss.teacher_temp"), ("dominance", "raise loss.teacher_temp")]
)
def test_the_message_says_what_was_found_and_what_to_change(kind, advice):
    message = describe_collapse(kind, entropy_ratio=0.999, kl=0.0021)
    for part in (kind, advice, "loss.use_bn=true", "loss.center_momentum", "0.999", "0.0021"):
        assert part in message
