"""The backend of PyTorch's products. Its derivatives are those of the backends with kernels."""

import pytest
import torch

import icsd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["kl", "rkd_distance"])
def test_one_product_for_each_gradient(loss, dtype, monkeypatch):
    student, teacher = torch.randn(3, 6, 50).to(dtype).requires_grad_(), torch.randn(3, 6, 70).to(dtype)
    results = []
    for backend in ("composite", "reference"):
        value = icsd.similarity_distillation_loss(student, teacher, loss, center=True, backend=backend)
        with torch.profiler.profile() as profile:
            (grad,) = torch.autograd.grad(value, student)
        products = [event.count for event in profile.key_averages() if event.key == "aten::bmm"]
        results.append((value.detach(), grad, products))
    (value, grad, products), (expected, gradient, of_reference) = results
    assert (products, of_reference) == ([1], [2])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, gradient)


def test_autocast_changes_nothing():
    x = torch.randn(4, 30, requires_grad=True)
    plain = icsd.cross_sample_similarity(x, backend="composite")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = icsd.cross_sample_similarity(x, backend="composite")
        (grad,) = torch.autograd.grad(cast.square().sum(), x, retain_graph=True)
    assert torch.equal(cast, plain)
    assert torch.equal(grad, torch.autograd.grad(plain.square().sum(), x)[0])
