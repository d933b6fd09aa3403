"""Errors are at most twice those of plain PyTorch in the same dtype; special values and shapes."""

from functools import partial

import pytest
import torch
from inputs import normal

import icsd
from benchmarks.peers import plain_loss, plain_similarity
from conformance import skip_above
from icsd.losses import KL, MSE, SmoothL1
from icsd.ops import flatten_samples

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = [MSE(), KL(), KL(0.5, 0.05), SmoothL1(), SmoothL1(0.01)]
SHAPES = [
    (2, 1),
    (3, 2),
    (4, 17),
    (5, 64),
    (7, 129),
    (8, 1000),
    (16, 4099),
    (31, 255),
    (33, 63),
    (64, 1537),
    (130, 300),
    (520, 40),
]


IGNORE_SLOW_VMAP = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")


def relative_error(value, truth):
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def bound(dtype, plain_error):
    """Return twice the error of plain PyTorch, and a few roundings in case that error is small by luck."""
    ulps = 256 if dtype == torch.float64 else 4  # the truth is itself rounded to float64
    return 2 * plain_error + ulps * torch.finfo(dtype).eps


def features(n, d, dtype, seed, shift=0.3, groups=()):
    """Return samples with a common part, so that similarities are not all near zero."""
    samples, common = normal(*groups, n, d, seed=seed), normal(*groups, 1, d, seed=seed + 1000)
    return (samples + shift * common).to(dtype)


def loss_and_gradient(call, student):
    student = student.detach().requires_grad_()
    loss = call(student)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def measure(student, teacher, loss, backend):
    """Return (loss, gradient) of the backend, of plain PyTorch in the same dtype, and of plain PyTorch in float64."""
    ours = loss_and_gradient(lambda x: icsd.similarity_distillation_loss(x, teacher, loss, backend=backend), student)
    plain = loss_and_gradient(lambda x: plain_loss(x, teacher, loss), student)
    truth = loss_and_gradient(lambda x: plain_loss(x, teacher.double(), loss), student.double())
    return ours, plain, truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity(shape, dtype, backend, limits):
    skip_above(limits, shape[0])
    x = features(*shape, dtype, seed=0)
    truth = plain_similarity(x.double())
    error = relative_error(icsd.cross_sample_similarity(x, backend=backend), truth)
    assert error <= bound(dtype, relative_error(plain_similarity(x), truth))


def test_gradient_of_cka_of_many_samples(backend, limits):
    skip_above(limits, 400)
    student = features(400, 384, torch.float32, seed=0, groups=(2,))
    teacher = student[..., :200] + features(400, 200, torch.float32, seed=1, groups=(2,))

    def gradient(student, teacher, backend):
        cka = partial(icsd.similarity_distillation_loss, teacher=teacher, loss="cka", backend=backend)
        return loss_and_gradient(cka, student)[1]

    truth = gradient(student.double(), teacher.double(), "reference")
    error, plain_error = (relative_error(gradient(student, teacher, each), truth) for each in (backend, "reference"))
    assert error <= bound(torch.float32, plain_error)


def loss_errors(student, teacher, loss, backend):
    """Return the relative errors of the losses of all groups together: the backend's and plain PyTorch's.

    The error of a single loss may be small by luck, and that of a loss near 0 is large relative to it.
    """
    ours = icsd.similarity_distillation_loss(student, teacher, loss, reduction="none", backend=backend)
    plain_losses = torch.vmap(partial(plain_loss, loss=loss))
    plain, truth = plain_losses(student, teacher), plain_losses(student.double(), teacher.double())
    return relative_error(ours, truth), relative_error(plain, truth)


@IGNORE_SLOW_VMAP
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses(loss, dtype, backend, limits):
    for seed, (n, d) in enumerate(SHAPES):
        if n > limits.samples or d < 16:
            continue  # cosines of a few features are ±1 or nearly: the loss is a rounding error itself
        groups = (limits.groups if n * d <= 8192 else 8,)
        student = features(n, d, dtype, seed, groups=groups)
        teacher = features(n, d + 5, dtype, seed + 100, shift=0.8, groups=groups)
        error, plain_error = loss_errors(student, teacher, loss, backend)
        assert error <= bound(dtype, plain_error), (n, d)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_gradients_of_losses(loss, dtype, backend, limits):
    for seed, (n, d) in enumerate(SHAPES):
        if n > limits.samples or d < 16:
            continue
        student, teacher = features(n, d, dtype, seed), features(n, d + 5, dtype, seed + 100, shift=0.8)
        (_, gradient), (_, plain_gradient), (_, truth) = measure(student, teacher, loss, backend)
        error = relative_error(gradient, truth)
        assert error <= bound(dtype, relative_error(plain_gradient, truth)), (n, d)


@pytest.mark.parametrize("shift", [1, 10, 30])
@pytest.mark.parametrize("shape", [(5, 100), (33, 513), (64, 2048)], ids=str)
def test_bfloat16_gradients_of_samples_much_alike(shape, shift, backend):
    # The terms of the gradient cancel, and what is left must not be their rounding.
    student, teacher = (features(*shape, torch.bfloat16, seed, shift) for seed in (1, 2))
    for loss in LOSSES[:2]:
        (_, gradient), _, (_, truth) = measure(student, teacher, loss, backend)
        assert relative_error(gradient, truth) <= 2 * relative_error(truth.bfloat16(), truth)


@IGNORE_SLOW_VMAP
@pytest.mark.parametrize("scale", [1e-12, 1e-5, 1e4, 1e12, 1e16])
@pytest.mark.parametrize("loss", LOSSES[:2], ids=repr)
def test_huge_and_tiny_norms(loss, scale, backend, limits):
    # Every other row, so that rows of very different norms meet.
    factors = torch.tensor([1.0, scale]).repeat(6)[:, None]
    student = features(12, 65, torch.float32, 1, groups=(limits.groups,)) * factors
    teacher = features(12, 70, torch.float32, 2, groups=(limits.groups,)) * factors
    error, plain_error = loss_errors(student, teacher, loss, backend)
    assert error <= bound(torch.float32, plain_error) + 1e-6
    (_, gradient), (_, plain_gradient), (_, true_gradient) = measure(student[0], teacher[0], loss, backend)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        error = relative_error(gradient[rows], true_gradient[rows])
        assert error <= bound(torch.float32, relative_error(plain_gradient[rows], true_gradient[rows])) + 1e-6


LAYOUTS = {
    "channels_last": lambda x: flatten_samples(x.view(x.shape[0], -1, 5, 7).to(memory_format=torch.channels_last)),
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "sliced columns": lambda x: torch.cat([x + 1, x, x - 1], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "strided columns": lambda x: torch.stack([x, x + 1], -1).flatten(1)[:, ::2],
    "expanded samples": lambda x: x[:1].expand(x.shape[0], -1),
    "expanded features": lambda x: x[:, :1].expand(-1, x.shape[1]),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_are_as_their_contiguous_copies(layout, dtype, fused_backend):
    base = features(9, 210, dtype, 3)
    teacher = features(9, 100, dtype, 4)
    x = LAYOUTS[layout](base)
    assert layout in ("channels_last", "unaligned") or not x.is_contiguous()
    for loss in ("mse", "kl"):
        results = []
        for student in (x.detach(), x.detach().clone(memory_format=torch.contiguous_format)):
            student.requires_grad_()
            value = icsd.similarity_distillation_loss(student, teacher, loss, backend=fused_backend)
            results.append((value, *torch.autograd.grad(value, student)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=1e-12)


def test_channels_last_maps_are_not_copied():
    maps = torch.randn(4, 8, 3, 5).to(memory_format=torch.channels_last)
    rows = flatten_samples(maps)
    assert rows.shape == (4, 120)
    assert rows.data_ptr() == maps.data_ptr()
    assert rows.is_contiguous()
    torch.testing.assert_close(icsd.cross_sample_similarity(rows), plain_similarity(maps.flatten(1)))


@pytest.mark.parametrize("batch", [(3,), (2, 3), (1, 1, 4), (40,)])
def test_groups_are_independent(batch, backend):
    student = torch.randn(*batch, 6, 50, requires_grad=True)
    teacher = torch.randn(*batch, 6, 20)
    losses = icsd.similarity_distillation_loss(student, teacher, "kl", reduction="none", backend=backend)
    assert losses.shape == batch
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in batch)).view(-1, len(batch)).tolist():
        one = student.detach()[tuple(index)].requires_grad_()
        loss = icsd.similarity_distillation_loss(one, teacher[tuple(index)], "kl", backend=backend)
        torch.testing.assert_close(losses[tuple(index)], loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient[tuple(index)], torch.autograd.grad(loss, one)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", ["mse", "kl", "smooth_l1"])
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (5, 0), (0, 0), (2, 0, 3), (0, 4, 3), (1, 1, 1), (5, 1)], ids=str)
def test_degenerate_shapes(shape, loss, backend):
    student = torch.randn(shape, requires_grad=True)
    teacher = torch.randn(shape)
    assert icsd.cross_sample_similarity(student, backend=backend).shape == (*shape[:-1], shape[-2])
    for reduction in ("mean", "sum", "none"):
        value = icsd.similarity_distillation_loss(student, teacher, loss, reduction=reduction, backend=backend)
        assert value.shape == (shape[:-2] if reduction == "none" else ())
        (gradient,) = torch.autograd.grad(value.sum(), student)
        assert gradient.shape == shape
        assert value.isfinite().all()
        assert gradient.isfinite().all()
        if 0 in shape or shape[-2] == 1:
            assert value.abs().sum() <= 1e-12
            assert gradient.abs().sum() <= 1e-6


def test_single_sample_without_its_diagonal(backend):
    x = torch.randn(1, 5, requires_grad=True)
    value = icsd.similarity_distillation_loss(x, torch.randn(1, 5), KL(include_diagonal=False), backend=backend)
    assert value == 0
    assert torch.autograd.grad(value, x)[0].eq(0).all()


@pytest.mark.parametrize("loss", ["mse", "kl", "smooth_l1"])
@pytest.mark.parametrize("n", [3, 16, 70])
def test_zero_rows(n, loss, backend, limits):
    skip_above(limits, n)
    student, teacher = features(n, 40, torch.float32, 5), features(n, 30, torch.float32, 6)
    student[1] = 0
    teacher[2] = 0
    student.requires_grad_()
    similarity = icsd.cross_sample_similarity(student, backend=backend)
    assert similarity[1].eq(0).all()
    assert similarity[:, 1].eq(0).all()
    value = icsd.similarity_distillation_loss(student, teacher, loss, backend=backend)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[1].eq(0).all()
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(5, 33), (17, 1030), (64, 70), (530, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row_and_column(shape, dtype, value, backend, limits):
    n, d = shape
    skip_above(limits, n)
    for row, column in ((0, d - 1), (n - 1, 0), (n // 2, d // 2)):
        x = features(n, d, dtype, 7)
        clean = icsd.cross_sample_similarity(x, backend=backend)
        x[row, column] = value
        similarity = icsd.cross_sample_similarity(x, backend=backend)
        assert similarity[row].isnan().all()
        assert similarity[:, row].isnan().all()
        others = torch.arange(n) != row
        torch.testing.assert_close(similarity[others][:, others], clean[others][:, others], rtol=0, atol=1e-6)
        x.requires_grad_()
        loss = icsd.similarity_distillation_loss(x, features(n, d, dtype, 8), "kl", backend=backend)
        assert loss.isnan()
        assert torch.autograd.grad(loss, x)[0].isnan().any()


def test_a_nan_of_all_ones_is_one(backend):
    """It is the NaN that NVIDIA's GPUs make; an addition to its bits would make a zero of it."""
    x = features(9, 70, torch.float32, 8)
    x[4, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    x.requires_grad_()
    assert icsd.cross_sample_similarity(x, backend=backend)[4].isnan().all()
    loss = icsd.similarity_distillation_loss(x, features(9, 70, torch.float32, 9), backend=backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, x)[0].isnan().any()


def test_overflowing_norms_are_nan(backend):
    x = features(4, 50, torch.float32, 9)
    x[2] *= 1e30
    similarity = icsd.cross_sample_similarity(x, backend=backend)
    assert similarity[2].isnan().all()
    assert similarity[:2, :2].isfinite().all()


def test_mixed_dtypes(backend):
    student, teacher = features(8, 90, torch.bfloat16, 10).requires_grad_(), features(8, 40, torch.float64, 11)
    loss = icsd.similarity_distillation_loss(student, teacher, backend=backend)
    truth = icsd.similarity_distillation_loss(student.double(), teacher, backend="reference")
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=0)
    assert torch.autograd.grad(loss, student)[0].dtype == torch.bfloat16
