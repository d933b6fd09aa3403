"""Irregular inputs: strides, weights, upstream gradients and norms that regular inputs do not have.

Inputs that are too regular hide mistakes: with contiguous groups a wrong stride does not show, with equal weights and
upstream gradients a wrong index does not, and with norms above eps a missing clamp does not.
"""

import mmap
from typing import NamedTuple

import pytest
import torch
from inputs import normal

import icsd
from icsd.losses import CC, DIST, KL, PKT, SP, SmoothL1
from icsd.ops.regimes import force_regime

LOSSES = {
    "mse": "mse",
    "smooth_l1": SmoothL1(0.1),
    "kl": KL(0.3, 0.2),
    "sp": SP(),
    "cc": CC(order=4),
    "pkt": PKT(),
    "dist": DIST(),
}
EPS = 0.5  # above some norms and below others
UPSTREAM = (1.0, -2.0, 0.5)  # gradients of the groups' losses
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Limits of the relative error of a gradient's rows, in each group. Results in half precision are rounded once: such an
# error has a norm of 0.2 units in the last place and no bias.
NORM = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-9, torch.float16: 2**-12}


class Case(NamedTuple):
    """A call of the operator with irregular inputs."""

    regime: str
    loss: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.regime}-{self.loss}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    *(Case(regime, loss, torch.float32) for loss in LOSSES for regime in ("sample", "streamed")),
    *(Case(regime, "kl", dtype) for dtype in DTYPES[1:] for regime in ("sample", "streamed")),
    *(Case("feature", "mse", dtype) for dtype in DTYPES),
]


def _strided_by_sample(x):
    """Return a view of memory (samples, groups, features)."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _with_gap(x):
    """Return a view of memory with two more samples in each group."""
    memory = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2]), torch.nan, dtype=x.dtype)
    return memory[:, :-2].copy_(x)


def _unaligned(x):
    """Return a view of memory (samples, groups, features + 3) whose rows begin at any multiple of an element."""
    memory = torch.full((x.shape[1], x.shape[0], x.shape[2] + 3), torch.nan, dtype=x.dtype)
    return memory[:, :, 1:-2].transpose(0, 1).copy_(x)


def stages(dtype, samples=37, dims=(40, 23, 31), seed=0):
    """Return two students and a teacher, of three groups each.

    Their groups overlap in memory, some norms are below EPS and one is zero. What lies between the samples is NaN.
    """
    common = normal(3, samples, 4, seed=seed, dtype=torch.float64)
    views = []
    for k, (dim, view) in enumerate(zip(dims, (_strided_by_sample, _with_gap, _unaligned), strict=True)):
        x = common @ normal(4, dim, seed=seed + 10 + k, dtype=torch.float64)
        x += normal(3, samples, dim, seed=seed + 20 + k, dtype=torch.float64)
        x[k, 5::7] *= 0.01
        x[:, 3 + k] *= 0.02
        x[1, 2 * k] = 0
        views.append(view(x.to(dtype)))
    return views


def loss_and_gradients(inputs, loss, regime, backend, **options):
    """Return the losses of the groups and the gradients of all stages."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    scale = inputs[0].shape[-2] * max(x.shape[-1] for x in inputs) / 8  # for gradients that are normal in float16
    settings = {"weights": [0.5 * scale, 2.0 * scale], "eps": EPS, "detach_teacher": False, "reduction": "none"}
    with force_regime(regime):
        losses = icsd.interstage_distillation_loss(inputs, LOSSES[loss], backend=backend, **settings | options)
        upstream = torch.tensor(UPSTREAM[: len(losses)], dtype=losses.dtype)
        return losses.detach(), torch.autograd.grad(losses, inputs, upstream)


def relative_error(value, truth):
    """Return the norm and the bias of the error of a row relative to the row, on average over all rows.

    The bias is the part of the error along the truth: numbers that are too small have a negative one.
    """
    norms = truth.norm(dim=1, keepdim=True)
    rows = norms[:, 0] > 0
    error, truth = (value.double() - truth)[rows] / norms[rows], truth[rows] / norms[rows]
    return error.square().sum(1).mean().sqrt().item(), (error * truth).sum(1).mean().item()


def check(case, backend, roundings=1, **shape):
    """Compare a case with the reference in float64.

    `roundings` tells how often a backend rounds on the way to a gradient in half precision. `shape` is that of
    `stages`.
    """
    limit = NORM[case.dtype] * roundings**0.5
    inputs = stages(case.dtype, **shape)
    losses, gradients = loss_and_gradients(inputs, case.loss, case.regime, backend)
    wide = [x.double() for x in inputs]
    true_losses, true_gradients = loss_and_gradients(wide, case.loss, "sample", "reference")
    exact = 1e-12 if case.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses.double(), true_losses, rtol=exact, atol=0)
    for k, (gradient, truth) in enumerate(zip(gradients, true_gradients, strict=True)):
        assert gradient.dtype == case.dtype
        errors = [relative_error(*of_group) for of_group in zip(gradient, truth, strict=True)]
        norm, bias = max(norm for norm, _ in errors), sum(bias for _, bias in errors) / len(errors)
        assert norm < limit, f"stage {k}: the error of the gradient has a relative norm of {norm:.3g}"
        assert abs(bias) < limit / 8, f"stage {k}: the gradient has a relative bias of {bias:.3g}"


def far_apart(x):
    """Return a view of the values of `x`, (groups, samples, features), with rows more than 2^31 elements apart.

    The memory between them is never touched, so that it exists as addresses only. It goes on for 2^32 elements before
    the view: offsets that wrap around at 32 bits read zeros.
    """
    groups, samples, dim = x.shape
    row = 2**31 // (samples - 1) + 16
    before, group = 2**32, samples * row
    size = (before + groups * group + dim) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
    return memory.view(x.dtype).as_strided(x.shape, (group, row, 1), before).copy_(x)


def check_far_apart(case, backend):
    """Compare rows that are more than 2^31 elements apart with a copy that is not."""
    near = [x[:2, :5].contiguous() for x in stages(case.dtype, dims=(40, 24, 33))]
    far = [far_apart(x) for x in near]
    results = [loss_and_gradients(inputs, case.loss, case.regime, backend) for inputs in (near, far)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert all(gradient.isfinite().all() for gradient in results[1][1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_irregular_inputs(case, fused_backend):
    # Matrices are rounded to bfloat16, too, where a processor multiplies that type.
    check(case, fused_backend, roundings=2 if case.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_beyond_32_bits(case, fused_backend):
    check_far_apart(case, fused_backend)
