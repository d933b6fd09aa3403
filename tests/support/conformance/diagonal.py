"""Losses without the comparisons of samples with themselves, or with them, in every regime."""

import math

import pytest
import torch
from inputs import normal
from torch.nn import functional as F

import icsd
from conformance.centering import relative_errors
from icsd.losses import CC, DIST, KL, MSE, PKT, SP, SmoothL1
from icsd.ops.regimes import force_regime


def others(matrix):
    """Return the rows of a matrix without its diagonal, one after the other."""
    n = len(matrix)
    return torch.stack([matrix[i, [j for j in range(n) if j != i]] for i in range(n)])


def cosines(x, eps):
    norms = x.norm(dim=-1).clamp(min=eps)
    return x @ x.mT / norms[:, None] / norms


def sp(x, y, _):
    rows = [F.normalize(others(z @ z.mT), dim=1) for z in (x, y)]
    return (rows[0] - rows[1]).square().mean()


def kl(x, y, eps):
    rows = [others(cosines(z, eps)) for z in (x, y)]
    return F.kl_div((rows[0] / 0.3).log_softmax(1), (rows[1] / 0.2).softmax(1), reduction="batchmean")


def cc_rbf(x, y, eps):
    kernels = [math.exp(-0.8) * (0.8 * s + (0.8 * s) ** 2 / 2) for s in (cosines(x, eps), cosines(y, eps))]
    return F.mse_loss(others(kernels[0]), others(kernels[1]))


def pkt_with_diagonal(x, y, eps):
    p, q = ((s + 1) / (s + 1).sum(1, keepdim=True) for s in (cosines(x, eps), cosines(y, eps)))
    return F.kl_div(p.log(), q, reduction="batchmean")


def dist(x, y, eps):
    pairs = zip(others(cosines(x, eps)), others(cosines(y, eps)), strict=True)
    return 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).mean()


CASES = {
    "mse": (
        MSE(include_diagonal=False),
        lambda x, y, eps: F.mse_loss(others(cosines(x, eps)), others(cosines(y, eps))),
    ),
    "smooth_l1": (
        SmoothL1(0.1, include_diagonal=False),
        lambda x, y, eps: F.smooth_l1_loss(others(cosines(x, eps)), others(cosines(y, eps)), beta=0.1),
    ),
    "kl": (KL(0.3, 0.2, include_diagonal=False), kl),
    "sp": (SP(include_diagonal=False), sp),
    "cc": (CC(include_diagonal=False), cc_rbf),
    "cc-bilinear": (
        CC("bilinear", include_diagonal=False),
        lambda x, y, _: F.mse_loss(others(x @ x.mT), others(y @ y.mT)),
    ),
    "pkt": (PKT(include_diagonal=True), pkt_with_diagonal),
    "dist": (DIST(include_diagonal=False), dist),
}
REGIMES = [*((regime, case) for case in CASES for regime in ("sample", "streamed")), ("feature", "mse")]
EPS = 1.5  # above some norms and below others
WEIGHTS, UPSTREAM = (0.5, -2.0), (1.0, -0.7, 2.5)


def features(*widths, zeros, n=9, dtype=torch.float64):
    """Return stages of three groups. Some norms are below EPS; one sample of each stage may be zero."""
    common = normal(3, n, 2, dtype=torch.float64)
    stages = []
    for k, width in enumerate(widths):
        x = common @ normal(2, width, seed=k, dtype=torch.float64) + 0.5 * normal(3, n, width, seed=10 + k)
        x[0, k] *= 0.1
        x[1, k + 1] *= 1 - zeros
        x[2, 4:6] *= 0.05
        stages.append(x.to(dtype).requires_grad_())
    return stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("regime", "case"), REGIMES)
def test_definition(regime, case, dtype, backend):
    loss, definition = CASES[case]
    eps = 1e-8 if case == "sp" else EPS
    zeros = case not in ("sp", "dist")  # their formulas do not hold for rows of zeros
    stages = features(5, 7, 4, zeros=zeros, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in stages]
    of_groups = [
        sum(weight * definition(x, y, eps) for weight, x in zip(WEIGHTS, students, strict=True))
        for *students, y in zip(*wide, strict=True)
    ]
    expected = torch.stack(of_groups)
    with force_regime(regime):
        value = icsd.interstage_distillation_loss(
            stages, loss, weights=WEIGHTS, detach_teacher=False, reduction="none", eps=eps, backend=backend
        )
        gradients = torch.autograd.grad(value, stages, torch.tensor(UPSTREAM, dtype=dtype))
    wanted = torch.autograd.grad(expected, wide, torch.tensor(UPSTREAM, dtype=torch.float64))
    if zeros and case != "cc-bilinear":  # zero samples have no direction, and gradient 0
        wanted = [grad * (x != 0).any(-1, keepdim=True) for grad, x in zip(wanted, wide, strict=True)]
    errors = relative_errors([value, *gradients], [expected, *wanted])
    assert max(errors) < (1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize(("regime", "case"), [("sample", "sp"), ("streamed", "dist"), ("feature", "mse")])
def test_gradcheck_and_gradgradcheck(regime, case, backend):
    stages = [normal(4, width, seed=width, dtype=torch.float64).requires_grad_() for width in (2, 3, 4)]

    def value(*stages):
        with force_regime(regime):
            return icsd.interstage_distillation_loss(
                stages, CASES[case][0], weights=WEIGHTS, detach_teacher=False, backend=backend
            )

    with force_regime(regime):
        assert torch.autograd.gradcheck(value, stages, fast_mode=True)
        assert torch.autograd.gradgradcheck(value, stages, fast_mode=True)


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize(("regime", "case"), REGIMES)
def test_few_samples(regime, case, n, backend):
    x, y = (normal(n, width, seed=width).requires_grad_() for width in (3, 4))
    loss, terms = CASES[case][0], n if case in ("kl", "pkt", "dist") else n * (n - 1)
    with force_regime(regime):
        value = icsd.similarity_distillation_loss(x, y, loss, detach_teacher=False, backend=backend)
        total = icsd.similarity_distillation_loss(x, y, loss, reduction="sum", backend=backend)
        gradients = torch.autograd.grad(value, (x, y))
    torch.testing.assert_close(total, terms * value)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert value.isfinite()
    if n < 2:
        assert value.abs() < 1e-6


@pytest.mark.parametrize("regime", ["sample", "feature"])
def test_eps_whose_square_underflows(regime, backend):
    student, teacher = torch.randn(12, 3).requires_grad_(), torch.randn(12, 4)
    with torch.no_grad():
        student[3] = 0
    with force_regime(regime):
        value = icsd.similarity_distillation_loss(
            student, teacher, MSE(include_diagonal=False), eps=1e-30, backend=backend
        )
        (gradient,) = torch.autograd.grad(value, student)
    wide = student.detach().double().requires_grad_()
    expected = icsd.similarity_distillation_loss(
        wide, teacher.double(), MSE(include_diagonal=False), eps=1e-30, backend="reference"
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, wide)[0], rtol=1e-4, atol=1e-7)
