"""Laws that hold whatever the shapes, strides, dtypes and values; the reference is the definition in float64."""

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import icsd
from icsd.losses import LOSSES, make_loss

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = sorted(LOSSES)
# These losses are functions of the similarities alone, whatever the lengths of the samples.
SCALE_INVARIANT = ["mse", "kl", "smooth_l1", "cc", "pkt", "dist"]

few = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def layouts(draw, groups, n, d):
    """Draw a function that lays values `(*groups, N, D)` out in memory somehow, as they are."""
    gap, shift, reverse = draw(st.integers(0, 3)), draw(st.integers(0, 2)), draw(st.booleans())
    kind = draw(st.sampled_from(["dense", "gap between samples", "gap between features", "transposed"]))

    def lay(values):
        if kind == "transposed":
            return values.mT.contiguous().mT
        step = 1 + gap if kind == "gap between features" else 1
        width = step * d + shift + (gap if kind == "gap between samples" else 0)
        memory = values.new_full((*groups, n, width), torch.nan)
        view = memory[..., shift : shift + step * d : step]
        view.copy_(values)
        if reverse and groups:  # samples lead, groups follow
            view = view.transpose(0, -2).contiguous().transpose(0, -2)
        return view

    return lay


@st.composite
def batches(draw, dtypes=DTYPES, samples=(0, 9), widths=(0, 70)):
    """Draw student and teacher in float64, the same in some dtype and layout, and that dtype."""
    groups = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    n, dtype = draw(st.integers(*samples)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([1e-2, 1.0, 30.0]))
    exact, given_ = [], []
    for _ in range(2):
        d = draw(st.integers(*widths))
        values = torch.randn(*groups, n, d, generator=generator) + 0.5 * torch.randn(d, generator=generator)
        values = (values * scale).to(dtype)
        exact.append(values.double())
        given_.append(draw(layouts(groups, n, d))(values))
    return exact, given_, dtype


def loss_of(student, teacher, loss, backend, **options):
    return icsd.similarity_distillation_loss(student, teacher, loss, backend=backend, **options)


def tolerance(dtype):
    return {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-5}


@few
@given(batch=batches(), loss=st.sampled_from(["mse", "kl", "smooth_l1", "pkt", "dist"]))
def test_values_and_gradients_are_those_of_float64(backend, batch, loss):
    exact, batch, dtype = batch
    results = []
    for (student, teacher), name in ((batch, backend), (exact, "reference")):
        student = student.detach().requires_grad_()
        value = loss_of(student, teacher, loss, name)
        results.append((value.double(), torch.autograd.grad(value, student)[0].double()))
    (value, gradient), (true_loss, true_gradient) = results
    torch.testing.assert_close(value, true_loss, **tolerance(dtype))
    relative = (gradient - true_gradient).norm() / true_gradient.norm().clamp(min=1e-3)
    bound = {torch.float64: 1e-8, torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
    assert relative <= bound[dtype] or (gradient - true_gradient).abs().max() < 1e-6


@few
@given(batch=batches())
def test_similarities_are_those_of_float64(backend, batch):
    exact, batch, dtype = batch
    for x, truth in zip(batch, exact, strict=True):
        similarity = icsd.cross_sample_similarity(x, backend=backend)
        true_similarity = icsd.cross_sample_similarity(truth, backend="reference")
        torch.testing.assert_close(similarity.double(), true_similarity, **tolerance(dtype))
        rounding = 1e-5 if backend == "reference" else 0  # a BLAS may sum the two triangles in different orders
        torch.testing.assert_close(similarity, similarity.mT, rtol=rounding, atol=rounding)


FLOAT64 = [torch.float64]


@few
@given(
    batch=batches(FLOAT64, (2, 9), (2, 70)),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 99),
)
def test_the_order_of_samples_does_not_matter(backend, batch, loss, seed):
    student, teacher = batch[1]
    student = student.detach().requires_grad_()
    order = torch.randperm(student.shape[-2], generator=torch.Generator().manual_seed(seed))
    output = loss_of(student, teacher, loss, backend)
    permuted = loss_of(student[..., order, :], teacher[..., order, :], loss, backend)
    torch.testing.assert_close(permuted, output, rtol=1e-7, atol=1e-10)
    gradients = [
        torch.autograd.grad(value, student)[0] for value in (output, permuted)
    ]  # equivariance, undone by autograd
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@few
@given(
    batch=batches(FLOAT64, (1, 9), (2, 70)),
    loss=st.sampled_from(SCALE_INVARIANT),
    seed=st.integers(0, 99),
)
def test_the_length_of_samples_does_not_matter(backend, batch, loss, seed):
    student, teacher = batch[1]
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.rand(*x.shape[:-1], 1, generator=generator).double() * 50 + 0.02 for x in (student, teacher)]
    scaled = loss_of(student * scales[0], teacher * scales[1], loss, backend)
    torch.testing.assert_close(scaled, loss_of(student, teacher, loss, backend), rtol=1e-7, atol=1e-10)


@few
@given(
    batch=batches(FLOAT64, (1, 9), (1, 40)),
    loss=st.sampled_from(LOSSES),
    seed=st.integers(0, 99),
)
def test_rotations_do_not_matter(backend, batch, loss, seed):
    student, teacher = batch[1]
    generator = torch.Generator().manual_seed(seed)
    d = student.shape[-1]
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(
        loss_of(student @ rotation, teacher, loss, backend),
        loss_of(student, teacher, loss, backend),
        rtol=1e-5,  # rkd_angle divides by small distances
        atol=1e-8,
    )


@few
@given(batch=batches(), loss=st.sampled_from(LOSSES))
@example(batch=(None, [torch.zeros(3, 4)] * 2, torch.float32), loss="dist")
def test_a_batch_agrees_with_itself(backend, batch, loss):
    student = batch[1][0].detach().requires_grad_()
    value = loss_of(student, student, loss, backend)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.abs() <= 1e-6
    assert gradient.isfinite().all()


@few
@given(batch=batches(FLOAT64, (2, 9), (2, 70)), loss=st.sampled_from(["mse", "smooth_l1"]))
def test_what_is_symmetric_is_symmetric(backend, batch, loss):
    student, teacher = batch[1]
    there, back = loss_of(student, teacher, loss, backend), loss_of(teacher, student, loss, backend)
    torch.testing.assert_close(there, back, rtol=1e-10, atol=1e-13)
    assert there >= 0


@few
@given(batch=batches(FLOAT64), loss=st.sampled_from(LOSSES))
def test_reductions_agree(backend, batch, loss):
    student, teacher = batch[1]
    none, mean, total = (
        loss_of(student, teacher, loss, backend, reduction=reduction) for reduction in ("none", "mean", "sum")
    )
    n = student.shape[-2]
    assert none.shape == student.shape[:-2]
    torch.testing.assert_close(mean, none.mean())
    terms = make_loss(loss).terms(n, n)
    torch.testing.assert_close(total, none.sum() * terms)
    for index in range(len(none) if none.dim() == 1 else 0):
        torch.testing.assert_close(none[index], loss_of(student[index], teacher[index], loss, backend))


@few
@given(
    batch=batches(samples=(0, 7)),
    samples=st.integers(1, 9),
    loss=st.sampled_from(["mse", "kl", "smooth_l1", "pkt", "dist"]),
)
def test_banks(backend, batch, samples, loss):
    exact, batch, dtype = batch
    banks = [torch.randn(*x.shape[:-2], samples, x.shape[-1], dtype=torch.float64).to(x.dtype) for x in batch]
    value = loss_of(*batch, loss, backend, student_bank=banks[0], teacher_bank=banks[1])
    banks = [bank.double() for bank in banks]
    truth = loss_of(*exact, loss, "reference", student_bank=banks[0], teacher_bank=banks[1])
    torch.testing.assert_close(value.double(), truth, **tolerance(dtype))
