"""Centered similarities on the CPU."""

import pytest
import torch
from conformance.centering import *  # noqa: F403
from conformance.centering import expected_of, features, loss_and_gradients, relative_errors

import icsd
from icsd.losses import MSE
from icsd.ops.regimes import force_regime


@pytest.mark.parametrize(
    ("regime", "loss"), [("sample", "mse"), ("sample", "kl"), ("feature", MSE(include_diagonal=False))]
)
def test_compile_fullgraph(regime, loss):
    def step(*stages):
        return icsd.interstage_distillation_loss(stages, loss, center=True, detach_teacher=False, backend="cpu")

    stages = [x.float().requires_grad_() for x in features(5, 6, 7)]
    with force_regime(regime):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        results = [[value := call(*stages), *torch.autograd.grad(value, stages)] for call in (step, compiled)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_transforms():
    x, y = features(5, 7)

    def loss(student, teacher):
        return icsd.similarity_distillation_loss(student, teacher, "kl", center=True, backend="cpu")

    expected = [torch.func.grad(loss)(*pair) for pair in zip(x, y, strict=True)]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x, y), torch.stack(expected))
    student = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(student, y[0]), student)[0], expected[0])


def test_centering_by_threads_and_in_blocks():
    # Chunks of features, with a rest, of samples that are not contiguous, on one thread and on several.
    x, y = (z.detach() for z in features(5000, 1300, n=24, batch=()))
    memory = torch.full((24, 5003), torch.nan, dtype=torch.float64)
    x = memory[:, 1:-2].copy_(x)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradients([x, x, y], "kl", "sample", center=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for result in results:
        assert max(relative_errors(result, expected_of([x, x, y], "kl"))) < 1e-11
    for n in (200, 530):  # several tiles, which are packed first if there are more
        many = features(40, 1100, n=n, batch=())
        results = loss_and_gradients([many[0], *many], "mse", "sample", center=True, backend="cpu")
        assert max(relative_errors(results, expected_of([many[0], *many], "mse"))) < 1e-11
