"""Losses of similarities to banks that are never whole, and their gradients, against the same from whole matrices."""

import math

import pytest
import torch
from inputs import normal
from torch.utils.checkpoint import checkpoint

import icsd
from icsd.losses import KL, MSE, SmoothL1, distill_to_banks
from icsd.losses.gram import similarity_to

LOSSES = [MSE(), MSE("teacher"), SmoothL1(0, 0.1), SmoothL1(0.3), KL(0.3, 0.2), KL(0.02, 0.01)]
# The gradients that are wanted: of student, teacher and their banks.
ALL, STUDENT, NONE = (True,) * 4, (True, False, False, False), (False,) * 4
# Losses, groups, and the gradients that are wanted, for kernels that have passes of their own for each gradient.
PASSES = (
    [(loss, (), ALL) for loss in LOSSES]
    + [(LOSSES[1], (), STUDENT), (LOSSES[5], (), STUDENT), (LOSSES[1], (), NONE), (LOSSES[4], (), NONE)]
    + [(LOSSES[3], (2, 1), (False, True, False, True)), (LOSSES[4], (2, 1), (True, False, False, True))]
)


def features(*groups, n=5, m=11, dtype=torch.float64):
    """Return student, teacher and banks, with a zero sample in each and norms below eps = 1.2."""
    x = [normal(*groups, count, 3, seed=k, dtype=torch.float64) for k, count in enumerate((n, n, m, m))]
    x[1][..., :2] += x[0][..., :2]
    x[3][..., :2] += x[2][..., :2]
    mixed = [z @ normal(3, 4 + k % 2, seed=9 + k, dtype=torch.float64) for k, z in enumerate(x)]
    for k, z in enumerate(mixed):
        z[..., k, :] = 0
        z[..., 4, :] *= 0.1
    return [z.to(dtype) for z in mixed]


def loss_of(tensors, loss, **options):
    return icsd.similarity_distillation_loss(
        *tensors[:2], loss, student_bank=tensors[2], teacher_bank=tensors[3], detach_teacher=False, **options
    )


def value_and_gradients(tensors, wanted, loss, **options):
    leaves = [x.clone().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    return differentiate(loss_of(leaves, loss, **options), leaves)


def from_whole_matrices(tensors, wanted, loss, eps):
    """Return the same for the loss of each group."""
    leaves = [x.clone().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    similarities = [similarity_to(*pair, eps) for pair in (leaves[::2], leaves[1::2])]
    return differentiate(distill_to_banks(*similarities, loss), leaves)


def differentiate(value, leaves):
    upstream = torch.linspace(1, -2, max(1, value.numel()), dtype=value.dtype).view(value.shape)
    inputs = [x for x in leaves if x.requires_grad]
    return value, torch.autograd.grad(value, inputs, upstream) if inputs else ()


@pytest.mark.parametrize("loss", [MSE("both"), KL(0.4, 0.3)], ids=str)
def test_gradcheck_and_gradgradcheck(loss, backend):
    tensors = [normal(4, 3, seed=k, dtype=torch.float64).requires_grad_() for k in range(4)]
    assert torch.autograd.gradcheck(lambda *x: loss_of(x, loss, backend=backend), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *x: loss_of(x, loss, backend=backend), tensors, fast_mode=True)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_one_bank_of_all_groups_for_student_and_teacher(loss, backend):
    x, y = (z.requires_grad_() for z in features(3)[::2])
    teacher, bank = x.detach() + 0.3, y[0].detach().clone().requires_grad_()
    shared = bank.expand(3, *bank.shape)
    gradients = torch.autograd.grad(loss_of((x, teacher, shared, shared), loss, backend=backend), (x, bank))
    alone = [loss_of((x[i], teacher[i], bank, bank), loss, backend="reference") for i in range(3)]
    for got, want in zip(gradients, torch.autograd.grad(sum(alone) / 3, (x, bank)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_bad_samples_spoil_their_group_alone(loss, backend):
    tensors = features(2, dtype=torch.float32)
    tensors[2][1, 7, 0] = math.nan
    options = {"reduction": "none", "backend": backend}
    value, (gradient,) = value_and_gradients(tensors, (True, False, False, False), loss, **options)
    assert value.isfinite().tolist() == [True, False]
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_accumulates_in_float32(loss, dtype, backend):
    tensors = [normal(n, 200, seed=k).to(dtype) for k, n in enumerate((6, 6, 40, 40))]
    wanted = (True, False, True, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradients = value_and_gradients(tensors, wanted, loss, backend=backend)
    assert value.dtype == torch.float32
    exact, truth = value_and_gradients([x.double() for x in tensors], wanted, loss)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    for got, want in zip(gradients, truth, strict=True):
        assert got.dtype == dtype
        assert torch.dist(got.double(), want) < max(1e-5, 2 * torch.finfo(dtype).eps) * want.norm()


@pytest.mark.parametrize("temperature", [1 / 61, 1 / 60], ids=["relative to the largest", "as they are"])
def test_large_exponents_in_float32(temperature, backend):
    tensors = [normal(n, 6, seed=k) for k, n in enumerate((5, 5, 11, 11))]
    tensors[2][:9] = -tensors[0][0]  # the first row of the student has nearly the least exponents alone
    tensors[3][:9] = tensors[1][1]  # the second one of the teacher nearly the largest alone
    wanted, loss = (True, False, False, True), KL(temperature, temperature)
    value, gradients = value_and_gradients(tensors, wanted, loss, backend=backend)
    exact, truth = value_and_gradients([x.double() for x in tensors], wanted, loss)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    for got, want in zip(gradients, truth, strict=True):
        assert torch.dist(got.double(), want) < 1e-4 * want.norm()


def test_many_upstream_gradients_at_once(backend):
    tensors = features(2)
    x = tensors[0].requires_grad_()
    value = loss_of(tensors, "kl", reduction="none", backend=backend)
    (both,) = torch.autograd.grad(value, x, torch.eye(2, dtype=x.dtype), is_grads_batched=True, retain_graph=True)
    for i in range(2):
        (one,) = torch.autograd.grad(value[i], x, retain_graph=True)
        torch.testing.assert_close(both[i], one)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_second_derivatives_of_many_upstream_gradients(loss, backend):
    tensors = [x.requires_grad_() for x in features(3)]
    upstream = normal(2, 3, seed=20, dtype=torch.float64)
    seconds = []
    for batched in (False, True):
        value = loss_of(tensors, loss, reduction="none", backend=backend).square()
        options = {"create_graph": True, "is_grads_batched": batched}
        chosen = upstream if batched else upstream.sum(0)
        (gradient,) = torch.autograd.grad(value, tensors[0], chosen, **options)
        total = gradient.sum(0) if batched else gradient
        seconds.append(torch.autograd.grad(total.square().sum(), tensors))
    for got, want in zip(*seconds, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", ["mse", "smooth_l1", "kl"])
def test_scaled_float16_gradients_do_not_underflow(loss, backend):
    tensors = [30 * normal(count, 40, seed=k) for k, count in enumerate((12, 12, 90, 90))]
    tensors[1], tensors[3] = tensors[0] + 3 * tensors[1], tensors[2] + 3 * tensors[3]
    found = []
    for dtype in (torch.float16, torch.float64):
        leaves = [x.half().to(dtype).requires_grad_() for x in tensors]
        value = loss_of(leaves, loss, backend=backend if dtype is torch.float16 else "reference")
        found.append(torch.autograd.grad(2**16 * value, leaves))
    for got, want in zip(*found, strict=True):
        assert got.dtype == torch.float16
        assert (got.double() - want).norm() < 2**-10 * want.norm()


@pytest.mark.parametrize("loss", ["mse", "kl", "dist"])
def test_constants_made_in_inference_mode(loss, backend):
    student, *constants = features()
    student.requires_grad_()
    gradients = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensors = [student, *(x.clone() for x in constants)]
        value = loss_of(tensors, loss, backend=backend)
        gradients.append(torch.autograd.grad(value, student)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(loss_of(tensors, loss, backend=backend), value.detach())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_checkpoint(loss, backend):
    tensors = [x.requires_grad_() for x in features()]
    expected = torch.autograd.grad(loss_of(tensors, loss, backend=backend), tensors)
    value = checkpoint(lambda *x: loss_of(x, loss, backend=backend), *tensors, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(value, tensors), expected)
