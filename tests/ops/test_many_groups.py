"""Many groups, each of which one thread computes from beginning to end."""

import pytest
import torch
from inputs import normal

import icsd
from icsd.losses import KL, MSE


@pytest.fixture
def threads():
    """Return a function that sets the number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("center", [False, True], ids=["", "centered"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float16")], ids=str)
@pytest.mark.parametrize("loss", [MSE("both"), KL(0.3, 0.2, include_diagonal=False)], ids=str)
def test_same_for_any_number_of_threads(loss, dtypes, center, threads):
    x, y = (normal(9, 70, dim, seed=k).to(getattr(torch, dtypes[k])) for k, dim in enumerate((75, 140)))
    y[..., :75] += x
    x.requires_grad_()
    y.requires_grad_()
    options = {"center": center, "reduction": "none", "detach_teacher": False}

    def results(student, teacher, backend="cpu"):
        values = icsd.similarity_distillation_loss(student, teacher, loss, backend=backend, **options)
        upstream = torch.linspace(1e3, -2e3, 9, dtype=values.dtype)  # in the range of float16
        return values.detach(), *torch.autograd.grad(values, (student, teacher), upstream)

    threads(1)
    values, *gradients = results(x, y)
    with torch.no_grad():
        assert torch.equal(icsd.similarity_distillation_loss(x, y, loss, backend="cpu", **options), values)
    threads(2)
    for got, want in zip(results(x, y), (values, *gradients), strict=True):
        assert torch.equal(got, want)
    exact, *truth = results(*(z.detach().double().requires_grad_() for z in (x, y)), backend="reference")
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=0)
    for got, want in zip(gradients, truth, strict=True):
        tolerance = max(1e-4, 2 * torch.finfo(got.dtype).eps)
        for group in range(9):
            assert torch.dist(got[group].double(), want[group]) < tolerance * want[group].norm()
