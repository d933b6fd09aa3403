"""Derivatives of every order, torch.library, torch.compile, autocast and determinism."""

import pytest
import torch

import icsd
from icsd.losses import KL, SmoothL1
from icsd.ops import flatten_samples
from icsd.ops.contract import Spec
from icsd.ops.regimes import force_regime

CASES = ["mse", SmoothL1(0.3), KL(0.4, 0.2), KL(include_diagonal=False), lambda s, t: ((s - t) ** 4).sum((-2, -1))]


def stages_of(*widths, n=4, batch=(), dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*batch, n, d, dtype=dtype, generator=generator).requires_grad_(requires_grad) for d in widths]


@pytest.mark.parametrize(("batch", "detach_teacher"), [((), True), ((2,), False)], ids=str)
@pytest.mark.parametrize("loss", CASES)
def test_gradcheck_and_gradgradcheck(loss, detach_teacher, batch, backend):
    stages = stages_of(3, 19, 2, batch=batch)

    def value(*stages):
        return icsd.interstage_distillation_loss(
            stages,
            loss,
            weights=[0.7, 1.3],
            detach_teacher=detach_teacher,
            backend=backend,
            reduction="none",
        )

    inputs = stages if not detach_teacher else [*stages[:-1], stages[-1].detach()]
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


def test_similarity_gradcheck(backend):
    (x,) = stages_of(7, batch=(2,))
    assert torch.autograd.gradcheck(lambda x: icsd.cross_sample_similarity(x, backend=backend), x)
    assert torch.autograd.gradgradcheck(lambda x: icsd.cross_sample_similarity(x, backend=backend), x)


def test_clamped_norms_gradcheck(backend):
    (x,) = stages_of(4)
    y = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        x[2] *= 0.1

    def loss(x):  # the third norm is below eps, and eps is large enough for finite differences
        return icsd.similarity_distillation_loss(x, y, eps=0.8, backend=backend)

    assert 0 < (x.detach().norm(dim=1) < 0.8).sum() < 4
    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_gradient_penalty_trains_through_the_gradient(fused_backend):
    student, teacher = stages_of(200, 50, dtype=torch.float32)
    penalties = []
    for backend in ("reference", fused_backend):
        loss = icsd.similarity_distillation_loss(student, teacher, backend=backend)
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), student)[0])
    torch.testing.assert_close(penalties[1], penalties[0], rtol=1e-4, atol=1e-9)


def test_one_tensor_in_two_places(backend):
    (x,) = stages_of(8)
    loss = icsd.interstage_distillation_loss([x, x * 2 + 1, x], "kl", detach_teacher=False, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (again,) = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(gradient, again)
    assert again.isfinite().all()


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_opcheck(batch, fused_backend):
    stages = stages_of(9, 20, 4, batch=batch, dtype=torch.float32)
    matrix = torch.randn(*batch, 3, stages[1].shape[-2])
    for save in (True, False):
        spec = Spec("kl", (0.1, 0.2, 1.0), (1.0, 0.5), 1e-8, teacher_gradient=False, regime="sample")
        arguments = (stages, save, *spec, fused_backend)
        torch.library.opcheck(torch.ops.icsd.distill.default, arguments)
    spec = Spec("mse", (0.0, 1.0), (1.0, 0.5), 1e-8, teacher_gradient=True, regime="sample", center=True)
    loss, saved = torch.ops.icsd.distill(stages, True, *spec, fused_backend)
    arguments = (
        torch.ones_like(loss),
        saved,
        [stage.detach() for stage in stages],
        [True, False, True],
        *spec,
        fused_backend,
    )
    torch.library.opcheck(torch.ops.icsd.distill_backward.default, arguments)
    torch.library.opcheck(torch.ops.icsd.gram.default, (stages[1], fused_backend))
    torch.library.opcheck(torch.ops.icsd.combine.default, (matrix, stages[1].detach(), fused_backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend, dynamic):
    def step(coarse, fine):
        stages = [flatten_samples(coarse), fine * 2]
        loss = icsd.interstage_distillation_loss(stages, "kl", reduction="sum", backend=backend)
        return loss + icsd.cross_sample_similarity(fine, backend=backend).mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for n in (6, 7):
        coarse = torch.randn(n, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        fine = torch.randn(n, 130, requires_grad=True)
        results = []
        for call in (step, compiled):
            loss = call(coarse, fine)
            results.append((loss, *torch.autograd.grad(loss, (coarse, fine))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_autocast_keeps_wide_accumulation(backend):
    x = torch.randn(6, 4000, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = icsd.cross_sample_similarity(x, backend=backend)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, icsd.cross_sample_similarity(x.double()).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "regime"),
    [("mse", "sample"), ("mse", "feature"), ("kl", "streamed"), ("cka", "sample"), ("cka", "feature")],
)
def test_constants_made_in_inference_mode(loss, regime, backend):
    student, *constants = stages_of(5, 3, 4, n=7)
    gradients = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            stages = [student, *(x.detach().clone() for x in constants)]
        with force_regime(regime):
            value = icsd.interstage_distillation_loss(stages, loss, backend=backend)
        gradients.append(torch.autograd.grad(value, student)[0])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with torch.inference_mode(), force_regime(regime):
        torch.testing.assert_close(icsd.interstage_distillation_loss(stages, loss, backend=backend), value.detach())


@pytest.mark.parametrize("regime", ["sample", "feature", "streamed"])
def test_results_are_where_the_features_are(backend, regime):
    (x, y) = stages_of(5, 4, n=7, dtype=torch.float32)
    with torch.device("meta"), force_regime(regime):  # what torch.set_default_device does
        loss = icsd.similarity_distillation_loss(x, y, backend=backend)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        similarity = icsd.cross_sample_similarity(x, backend=backend)
    assert {tensor.device.type for tensor in (loss, grad, second, similarity)} == {"cpu"}


def test_deterministic(backend):
    (x, y) = stages_of(5000, 3000, n=24, dtype=torch.float32)
    runs = []
    for _ in range(3):
        loss = icsd.similarity_distillation_loss(x, y, "kl", backend=backend)
        runs.append((loss, *torch.autograd.grad(loss, x)))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)
