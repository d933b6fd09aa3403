"""Centered similarities: those of the samples minus their mean, in every regime, though no backend may subtract it."""

import pytest
import torch
from inputs import normal

import icsd
from icsd.losses import CC, CKA, DIST, KL, PKT, SP, SmoothL1
from icsd.ops.regimes import force_regime

LOSSES = {
    "mse": "mse",
    "smooth_l1": SmoothL1(0.1),
    "kl": KL(0.3, 0.2),
    "sp": SP(),
    "cc": CC("bilinear"),
    "pkt": PKT(),
    "dist": DIST(),
    "cka": CKA(),
    "custom": lambda s, t: ((s - t) ** 4).sum((-2, -1)),
}
CASES = [
    *((regime, loss) for loss in ("mse", "kl", "sp") for regime in ("sample", "streamed")),
    *(("sample", loss) for loss in LOSSES if loss not in ("mse", "kl", "sp")),
    ("feature", "mse"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def features(*widths, n=11, batch=(3,), shift=1.0, dtype=torch.float64):
    """Return stages that have something in common, with a mean sample that `shift` scales."""
    common = normal(*batch, n, 3, dtype=torch.float64)
    stages = []
    for seed, width in enumerate(widths, 1):
        x = common @ normal(3, width, seed=seed, dtype=torch.float64)
        x += 0.5 * normal(*batch, n, width, seed=seed + 10, dtype=torch.float64)
        stages.append((x + shift * (2 + normal(width, seed=seed + 20, dtype=torch.float64))).to(dtype))
    return stages


def loss_and_gradients(stages, loss, regime, **options):
    stages = [stage.detach().requires_grad_() for stage in stages]
    settings = {"weights": [0.5, -2.0], "detach_teacher": False, "reduction": "none"}
    with force_regime(regime):
        value = icsd.interstage_distillation_loss(stages, LOSSES[loss], **settings | options)
        upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
        return [value.detach(), *torch.autograd.grad(value, stages, upstream)]


def expected_of(stages, loss, **options):
    """Return the same in float64 by the features minus their mean, which autograd differentiates."""
    inputs = [stage.detach().double().requires_grad_() for stage in stages]
    apart = [x - x.mean(-2, keepdim=True) for x in inputs]
    value, *gradients = loss_and_gradients(apart, loss, "sample", backend="reference", **options)
    return [value, *torch.autograd.grad(apart, inputs, gradients)]


def relative_errors(results, expected):
    return [((got.double() - want).norm() / want.norm()).item() for got, want in zip(results, expected, strict=True)]


@pytest.mark.parametrize(("regime", "loss"), CASES)
def test_definition(regime, loss, backend):
    stages = features(5, 16, 7)
    stages[0][1, 4] = stages[0][1, 5:].mean(0)
    stages[0][1, :4] = stages[0][1, 5:9]  # so sample 4 is nearly the mean, and eps replaces its norm
    results = loss_and_gradients(stages, loss, regime, center=True, eps=1.5, backend=backend)
    errors = relative_errors(results, expected_of(stages, loss, eps=1.5))
    assert max(errors) < 1e-11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["sample", "feature", "streamed"])
@pytest.mark.parametrize("n", [11, 70])
def test_every_dtype(n, regime, dtype, backend):
    stages = features(33, 80, 40, n=n, batch=(), dtype=dtype)
    options = {"weights": [n, n]}  # for gradients that float16 holds
    results = loss_and_gradients(stages, "mse", regime, center=True, backend=backend, **options)
    assert [gradient.dtype for gradient in results[1:]] == [dtype] * 3
    errors = relative_errors(results, expected_of(stages, "mse", **options))
    assert errors[0] < 4e-6
    assert max(errors) < 2 * EPS[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_samples_in_a_plane(loss, dtype, backend):
    # Many samples are nearly parallel, and their terms of a gradient cancel. So matrices may not be rounded to dtype.
    stages = [(40 * normal(70, 2, seed=seed)).round().to(dtype) for seed in range(3)]
    results = loss_and_gradients(stages, loss, "sample", center=True, backend=backend, weights=[1e4, 1e4])
    assert max(relative_errors(results, expected_of(stages, loss, weights=[1e4, 1e4]))) < EPS[dtype]


@pytest.mark.parametrize(("regime", "loss"), [("sample", "kl"), ("sample", "mse"), ("feature", "mse")])
def test_means_that_dominate(regime, loss, backend):
    # The mean is 3,000 times as large as what differs, so cosines are 1 - 1e-7. Features are integers: float32 holds
    # their differences without rounding.
    stages = [(1000 * x).round() for x in features(64, 100, 80, shift=3000.0, batch=())]
    results = loss_and_gradients([x.float() for x in stages], loss, regime, center=True, backend=backend)
    errors = relative_errors(results, expected_of(stages, loss))
    assert errors[0] < 2e-6
    assert max(errors) < 3e-3  # a gradient that is not centered has the error of the mean, eps |x| / |x - mean|


@pytest.mark.parametrize(("regime", "loss"), [("sample", "kl"), ("streamed", "sp"), ("feature", "mse")])
def test_gradcheck_and_gradgradcheck(regime, loss, backend):
    stages = [x.requires_grad_() for x in features(2, 3, 4, n=4, batch=(2,))]

    def value(*stages):
        with force_regime(regime):
            return icsd.interstage_distillation_loss(
                stages,
                LOSSES[loss],
                center=True,
                weights=[0.7, 1.3],
                detach_teacher=False,
                reduction="none",
                backend=backend,
            )

    with force_regime(regime):
        assert torch.autograd.gradcheck(value, stages, fast_mode=True)
        assert torch.autograd.gradgradcheck(value, stages, fast_mode=True)


@pytest.mark.parametrize("loss", ["mse", "kl", "sp", "dist"])
def test_batches_without_variation(loss, backend):
    for x in (torch.full((5, 9), 0.1), torch.randn(1, 9)):  # 0.1 has no exact mean in binary
        x = x.requires_grad_()
        y = torch.randn(len(x), 4)
        value = icsd.similarity_distillation_loss(x, y, LOSSES[loss], center=True, backend=backend)
        (gradient,) = torch.autograd.grad(value, x)
        assert value.isfinite()
        assert (gradient == 0).all()
        assert (icsd.cross_sample_similarity(x, center=True, backend=backend) == 0).all()


@pytest.mark.parametrize("regime", ["sample", "feature", "streamed"])
def test_nan_makes_its_group_nan(regime, backend):
    stages = features(5, 6, 7, batch=(3,), dtype=torch.float32)
    stages[0][1, 4, 2] = torch.nan
    value, gradient, *_ = loss_and_gradients(stages, "mse", regime, center=True, backend=backend)
    assert value.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_similarity(backend):
    (x,) = features(6)
    expected = icsd.cross_sample_similarity(x - x.mean(-2, keepdim=True), backend="reference")
    torch.testing.assert_close(icsd.cross_sample_similarity(x, center=True, backend=backend), expected)
    torch.testing.assert_close(icsd.cross_sample_similarity(x, x, center=True, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", ["sample", "feature", "streamed"])
def test_groups_that_are_transposed_views_of_many_features(regime, dtype, backend):
    stages = features(300, 513, 259, n=5, batch=(3,), dtype=dtype)
    apart = [stage.transpose(0, 1).contiguous().transpose(0, 1) for stage in stages]
    assert not any(stage.is_contiguous() for stage in apart)
    results = loss_and_gradients(apart, "mse", regime, center=True, weights=[2.0, -5.0], backend=backend)
    errors = relative_errors(results, expected_of(stages, "mse", weights=[2.0, -5.0]))
    assert errors[0] < 4e-6
    assert max(errors) < 2 * EPS[dtype]
