"""Groups of more samples than usual, whose matrices are packed one after the other, against plain PyTorch."""

import pytest
import torch
from inputs import normal

import icsd
from icsd.losses import KL, MSE


@pytest.mark.parametrize(
    ("shape", "loss", "dtype"),
    [
        ((2, 530, 70), MSE("both"), torch.bfloat16),
        ((2, 530, 70), KL(), torch.float32),
        ((3, 1500, 6), MSE("both"), torch.float32),  # whose packed matrices take 9 MB each
        ((2, 1500, 6), KL(include_diagonal=False), torch.bfloat16),
    ],
    ids=str,
)
def test_against_plain_pytorch(shape, loss, dtype):
    x = normal(*shape).to(dtype).requires_grad_()
    y = (x.detach() + normal(*shape, seed=1)).to(dtype)
    results = []
    for backend, student, teacher in (("cpu", x, y), ("reference", x.float(), y.float())):
        value = icsd.similarity_distillation_loss(student, teacher, loss, reduction="none", backend=backend)
        upstream = torch.linspace(1, 2, len(value))
        results.append((value.detach(), *torch.autograd.grad(value, x, upstream)))
    (value, gradient), (expected, wanted) = results
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=0)
    for got, want in zip(gradient.float(), wanted.float(), strict=True):
        assert torch.dist(got, want) < (1e-2 if dtype == torch.bfloat16 else 1e-4) * want.norm()
