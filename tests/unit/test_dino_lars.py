"""LARS against numbers of the official code's class, in float64."""

import pytest
import torch

from dino_exp.dino.lars import Lars

SHAPES = [(3, 4), (2, 1, 2, 2), (5,), (3, 1), (2, 2)]
# Of each parameter after four steps: the first four values, the sum of all without signs, and that of the momentum.
OFFICIAL = [
    ([-0.000386422066, 0.64348023049, 0.98470807599, 0.862812326864], 7.320554530522388, 0.01406747120885878),
    ([0.84214852217, 0.992339392719, 0.675817541141, 0.041448140024], 5.40040546985676, 0.00841542758281369),
    ([-1.213712842063, -0.927163066793, -0.204554013888, 0.614259987993], 4.103867830180771, 15.613985921936564),
    ([0.140982598122, -0.530008539586, -0.951728379516], 1.6227195172243127, 0.003336155881080648),
    ([-2.125537004159, -0.399473389428, 1.514468802294, 2.716132652069], 6.755611847950273, 8.622545539730787),
]


def formula(shape, phase):
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + phase).reshape(shape)


def four_steps(**shares):
    """A parameter that begins as zero, one without a gradient for two steps, and at the end a gradient of zero."""
    parameters = [torch.nn.Parameter(formula(shape, float(at))) for at, shape in enumerate(SHAPES)]
    parameters[4].data.zero_()
    groups = [{"params": [*parameters[:2], *parameters[3:]]}, {"params": [parameters[2]], "weight_decay": 0.0}]
    optimizer = Lars(groups, **shares)
    for step in range(4):
        for at, parameter in enumerate(parameters):
            late = at == 3 and step < 2
            parameter.grad = None if late else formula(parameter.shape, 10.0 * at + step) * (at + 1)
        if step == 3:
            parameters[0].grad = torch.zeros_like(parameters[0])
        for group in optimizer.param_groups:
            group["lr"] = 0.3 / (step + 1)
        optimizer.param_groups[0]["weight_decay"] = 0.0 if step == 3 else 0.1
        gradients = [None if one.grad is None else one.grad.clone() for one in parameters]
        optimizer.step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert gradient is None or torch.equal(parameter.grad, gradient)
        assert ("mu" in optimizer.state[parameters[3]]) == (step >= 2)
    return parameters, optimizer


def test_four_steps_are_those_of_the_official_class():
    parameters, optimizer = four_steps()
    for parameter, (first, size, momentum) in zip(parameters, OFFICIAL, strict=True):
        assert parameter.detach().flatten()[:4].tolist() == pytest.approx(first, abs=2e-12)
        assert parameter.detach().abs().sum().item() == pytest.approx(size, rel=1e-12)
        assert optimizer.state[parameter]["mu"].abs().sum().item() == pytest.approx(momentum, rel=1e-12)


def test_norms_are_those_that_it_is_given():
    """Of a share, the norms of whole tensors count: here those of a tensor with three more parts like this one."""
    asked = []

    def doubled(norms):
        asked.append(norms.numel())
        return norms * 2

    whole, _ = four_steps()
    share, _ = four_steps(whole_norms=doubled)
    for one, other in zip(whole, share, strict=True):
        torch.testing.assert_close(one, other)  # of a quotient, a common factor falls out
    assert asked == [6, 6, 8, 8]  # once a step: of each matrix its own norm and that of its move
    half, _ = four_steps(whole_norms=lambda norms: torch.cat([norms.chunk(2)[0] / 2, norms.chunk(2)[1]]))
    assert not torch.allclose(half[0], whole[0], rtol=1e-5)
