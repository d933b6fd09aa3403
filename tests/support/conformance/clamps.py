"""Clamped similarities and margins, in every regime, against their formulas element by element."""

import math

import pytest
import torch
from inputs import normal

import icsd
from conformance.centering import relative_errors
from icsd.losses import MSE, SmoothL1
from icsd.ops.regimes import force_regime


def clamped(s, t):
    return (max(s, 0) - max(t, 0)) ** 2


def clamped_teacher(s, t):
    return (s - max(t, 0)) ** 2


def margin(s, t):
    return max(abs(s - t) - 0.2, 0)


def huber_with_margin(s, t):
    x = max(abs(s - t) - 0.1, 0)
    return x * x / 0.6 if x < 0.3 else x - 0.15


CASES = {
    "both": (MSE("both"), clamped),
    "both-without-diagonal": (MSE("both", include_diagonal=False), clamped),
    "teacher": (MSE("teacher"), clamped_teacher),
    "l1": (SmoothL1(0), lambda s, t: abs(s - t)),
    "margin": (SmoothL1(0, 0.2), margin),
    "huber": (SmoothL1(0.3, 0.1, include_diagonal=False), huber_with_margin),
}
EPS = 1.5  # above one norm of each stage


def stages_of(n=7, dtype=torch.float64):
    """Return two students and a teacher of three groups, whose similarities have both signs and are related."""
    common = normal(3, n, 3, dtype=torch.float64)
    stages = [common @ normal(3, width, seed=k, dtype=torch.float64) for k, width in enumerate((5, 9, 4), 1)]
    for k, x in enumerate(stages):
        x += 0.6 * normal(*x.shape, seed=10 + k, dtype=torch.float64)
        x[1, k] *= 0.1
    return [x.to(dtype).requires_grad_() for x in stages]


def formula(of_element, include_diagonal, x, y):
    """Return the mean of a function of elements over the cosine similarities of two groups."""
    cosines = []
    for z in (x, y):
        norms = z.norm(dim=-1).clamp(min=EPS)
        cosines.append(z @ z.mT / norms[:, None] / norms)
    s, t = cosines
    pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if include_diagonal or i != j]
    return sum(of_element(s[pair], t[pair]) for pair in pairs) / len(pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("regime", ["sample", "streamed", "feature"])  # no loss here is in feature space
@pytest.mark.parametrize("case", CASES)
def test_formula(case, regime, dtype, backend):
    loss, of_element = CASES[case]
    stages, weights, upstream = stages_of(dtype=dtype), (0.5, -2.0), torch.tensor([1.0, -0.7, 2.5], dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in stages]
    expected = torch.stack(
        [
            sum(w * formula(of_element, loss.include_diagonal, x, y) for w, x in zip(weights, students, strict=True))
            for *students, y in zip(*wide, strict=True)
        ]
    )
    with force_regime(regime):
        value = icsd.interstage_distillation_loss(
            stages, loss, weights=weights, detach_teacher=False, reduction="none", eps=EPS, backend=backend
        )
        gradients = torch.autograd.grad(value, stages, upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double())
    errors = relative_errors([value, *gradients], [expected, *wanted])
    assert max(errors) < (1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("regime", ["sample", "streamed"])
@pytest.mark.parametrize("case", ["both", "teacher", "huber"])
def test_gradcheck_and_gradgradcheck(case, regime, backend):
    x, y = (normal(5, width, seed=width, dtype=torch.float64).requires_grad_() for width in (3, 4))

    def value(x, y):
        with force_regime(regime):
            return icsd.similarity_distillation_loss(x, y, CASES[case][0], detach_teacher=False, backend=backend)

    with force_regime(regime):
        assert torch.autograd.gradcheck(value, (x, y), fast_mode=True)
        assert torch.autograd.gradgradcheck(value, (x, y), fast_mode=True)


@pytest.mark.parametrize("regime", ["sample", "streamed"])
@pytest.mark.parametrize("case", ["both", "teacher", "margin"])
def test_equal_features_cost_nothing_and_nan_costs_all(case, regime, backend):
    x = normal(2, 6, 8)
    x = (x.abs() if case == "teacher" else x).requires_grad_()  # the student's negative similarities would cost
    y = x.detach().clone()
    y[1, 3, 2] = math.nan
    with force_regime(regime):
        value = icsd.similarity_distillation_loss(x, y, CASES[case][0], reduction="none", backend=backend)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value[0] == 0
    assert (gradient[0] == 0).all()
    assert value[1].isnan()
