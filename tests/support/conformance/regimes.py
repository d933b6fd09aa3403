"""The regimes of many samples, forced on few: each agrees with the definition and with the others up to rounding."""

import pytest
import torch

import icsd
from conformance import skip_above
from icsd.losses import CC, DIST, KL, MSE, PKT, SP, SmoothL1
from icsd.ops import registry
from icsd.ops.contract import Spec, saved_dtype
from icsd.ops.regimes import force_regime

LOSSES = {
    "mse": MSE(),
    "smooth_l1": SmoothL1(0.1),
    "kl": KL(0.3, 0.2),
    "kl-others": KL(include_diagonal=False),
    "sp": SP(),
    "cc": CC(order=4),
    "cc-bilinear": CC("bilinear"),
    "pkt": PKT(),
    "dist": DIST(),
}
CASES = [("feature", "mse"), *(("streamed", case) for case in LOSSES)]
# One block and less, whole blocks, several blocks with a rest, several squares of blocks.
SHAPES = [(5, 7, 3), (192, 16, 16), (600, 33, 50), (1400, 20, 10)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def features(n, *widths, batch=(), dtype=torch.float64, seed=0):
    """Return stages with a common part."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(*batch, n, 4, generator=generator, dtype=torch.float64)
    stages = []
    for width in widths:
        mixed = common @ torch.randn(4, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(*batch, n, width, generator=generator, dtype=torch.float64)
        stages.append((mixed + noise).to(dtype).requires_grad_())
    return stages


def loss_of(case, stages, regime, **options):
    with force_regime(regime):
        return icsd.interstage_distillation_loss(stages, LOSSES[case], **{"detach_teacher": False} | options)


def loss_and_gradients(case, stages, regime, **options):
    stages = [stage.detach().requires_grad_() for stage in stages]
    loss = loss_of(case, stages, regime, **options)
    with force_regime(regime):
        return [loss.detach(), *torch.autograd.grad(loss.sum(), stages)]


def assert_close(results, expected, tolerance):
    for got, want in zip(results, expected, strict=True):
        assert got.isfinite().all()
        error = torch.dist(got.double(), want.double()) / want.double().norm().clamp(min=1e-300)
        assert error <= tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("regime", "case"), CASES)
def test_definition(regime, case, shape, dtype, fused_backend, limits):
    skip_above(limits, shape[0])
    stages = features(*shape, shape[1] + 2, dtype=dtype)
    weights = [shape[0]] * 2  # for gradients that float16 holds
    results = loss_and_gradients(case, stages, regime, weights=weights, backend=fused_backend)
    wide = [stage.double() for stage in stages]
    # Gradients are differences, with the rounding of what they are differences of.
    expected = loss_and_gradients(case, wide, "sample", backend="reference", weights=weights)
    assert_close(results, expected, 8 * EPS[dtype])


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_boundaries_agree(regime, case, fused_backend):
    stages = features(700, 40, 30, 50, dtype=torch.float32)
    sample = loss_and_gradients(case, stages, "sample", weights=[0.5, 2.0], backend=fused_backend)
    assert_close(loss_and_gradients(case, stages, regime, weights=[0.5, 2.0], backend=fused_backend), sample, 8e-6)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_groups_and_weights(regime, case, fused_backend):
    stages = features(9, 6, 5, 7, batch=(2, 3))
    options = {"weights": [0.5, -2.0], "reduction": "none"}
    assert_close(
        loss_and_gradients(case, stages, regime, **options, backend=fused_backend),
        loss_and_gradients(case, stages, "sample", backend="reference", **options),
        1e-13,
    )


LAYOUTS = {
    "strided rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "strided columns": lambda x: torch.stack([x, x + 1], -1).flatten(1)[:, ::2],
    "expanded samples": lambda x: x[:1].expand(x.shape[0], -1),
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("regime", "case"), [("feature", "mse"), ("streamed", "kl")])
def test_layouts(regime, case, layout, fused_backend):
    x, y = (stage.detach() for stage in features(250, 21, 18, dtype=torch.float32))
    x = LAYOUTS[layout](x)
    results = [
        loss_and_gradients(case, [z, y], regime, backend=fused_backend)
        for z in (x, x.clone(memory_format=torch.contiguous_format))
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_gradcheck_and_gradgradcheck(regime, case, fused_backend):
    stages = features(4, 3, 2, 5, batch=(2,))

    def loss(*stages):
        return loss_of(case, stages, regime, weights=[0.7, 1.3], reduction="none", backend=fused_backend)

    with force_regime(regime):
        assert torch.autograd.gradcheck(loss, stages)
        assert torch.autograd.gradgradcheck(loss, stages)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_many_gradients_at_once(regime, case, fused_backend):
    stages = features(5, 4, 3, batch=(2,))
    loss = loss_of(case, stages, regime, reduction="none", backend=fused_backend)
    batched = torch.autograd.grad(
        loss, stages, torch.eye(2, dtype=loss.dtype), is_grads_batched=True, retain_graph=True
    )
    for k in range(2):
        one = torch.autograd.grad(loss[k], stages, retain_graph=True)
        torch.testing.assert_close([gradient[k] for gradient in batched], list(one))


@pytest.mark.parametrize("regime", ["feature", "streamed"])
def test_clamped_norms(regime, fused_backend):
    stages = features(5, 4, 6)
    with torch.no_grad():
        stages[0][2] *= 0.02
        stages[1][3] = 0
    assert (stages[0].norm(dim=1) < 0.8).sum() == 1
    expected = loss_and_gradients("mse", stages, "sample", backend="reference", eps=0.8)
    results = loss_and_gradients("mse", stages, regime, eps=0.8, backend=fused_backend)
    assert_close(results, expected, 1e-13)
    assert results[2][3].eq(0).all()


@pytest.mark.parametrize(("regime", "case"), CASES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 0), (2, 0, 3), (0, 4, 3)], ids=str)
def test_degenerate_shapes(regime, case, shape, fused_backend):
    stages = [torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)]
    results = loss_and_gradients(case, stages, regime, reduction="none", backend=fused_backend)
    doubled = [stage.detach().double() for stage in stages]
    expected = loss_and_gradients(case, doubled, "sample", backend="reference", reduction="none")
    for got, want in zip(results, expected, strict=True):
        # The elements of a gradient are compared with its largest one: where they cancel, no float32 has their digits.
        scale = want.abs().max().item() if want.numel() else 0
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 + 1e-5 * scale)


@pytest.mark.parametrize("degenerate", [torch.zeros_like, lambda x: x[:1].expand_as(x)], ids=["zero", "constant"])
@pytest.mark.parametrize(("regime", "case"), CASES)
def test_collapsed_features(regime, case, degenerate, fused_backend):
    x, y = (stage.detach() for stage in features(230, 9, 5, dtype=torch.float32))
    for student, teacher in ((degenerate(x), y), (x, degenerate(y)), (degenerate(x), degenerate(y))):
        results = loss_and_gradients(case, [student, teacher], regime, backend=fused_backend)
        expected = loss_and_gradients(case, [student.double(), teacher.double()], "sample", backend="reference")
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("regime", "case"), CASES)
def test_nan_and_inf_are_not_hidden(regime, case, value, fused_backend):
    stages = [stage.detach() for stage in features(300, 9, 5, batch=(2,), dtype=torch.float32)]
    for stage in range(2):
        damaged = [x.clone() for x in stages]
        damaged[stage][1, 250, 3] = value
        loss = loss_of(case, damaged, regime, reduction="none", backend=fused_backend)
        assert loss.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("regime", "case"), [case for case in CASES if "kl" not in case])  # its temperatures differ
def test_identical_features(regime, case, fused_backend):
    (x,) = features(400, 12, dtype=torch.float32)
    loss, gradient, _ = loss_and_gradients(case, [x, x], regime, backend=fused_backend)
    assert loss == 0
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_feature_space_does_not_cancel(difference, fused_backend):
    """The bounds stated in docs/losses.md."""
    x, noise = features(3000, 24, 24, dtype=torch.float64)
    y = (x + difference * noise).float()
    stages = [x.float(), y]
    loss, *gradients = loss_and_gradients("mse", stages, "feature", backend=fused_backend)
    expected, *true_gradients = loss_and_gradients(
        "mse", [stage.double() for stage in stages], "sample", backend="reference"
    )
    assert (loss - expected).abs() <= 1e-5 * expected
    assert_close(gradients, true_gradients, 1e-5)


def test_cancellation_is_found_for_every_group_and_student(fused_backend):
    """Only the second student is close to the teacher, and only in the second group."""
    far, other, teacher = (stage.detach() for stage in features(300, 12, 10, 10, batch=(2,)))
    near = torch.stack([other[0], teacher[1] + 1e-4 * other[1]])
    stages = [stage.float() for stage in (far, near, teacher)]
    options = {"weights": [0.0, 1.0], "reduction": "none"}
    losses, _, gradient, _ = loss_and_gradients("mse", stages, "feature", backend=fused_backend, **options)
    wide = [stage.double() for stage in stages]
    expected, _, truth, _ = loss_and_gradients("mse", wide, "sample", backend="reference", **options)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)
    assert_close(gradient, truth, 1e-5)


def test_feature_space_sums_in_float64(fused_backend):
    """float32 sums of so many terms would not resolve a difference that float32 products do."""
    x = torch.ones(200_000, 2)
    y = x.clone()
    y[:, 1] = -0.7
    loss, *_ = loss_and_gradients("mse", [x, y], "feature", backend=fused_backend)
    cosine = icsd.cross_sample_similarity(torch.stack([x[0], y[0]]))[0, 1]
    assert loss < 1e-12  # all samples are alike in both, whatever they are
    assert cosine < 0.5
    y[::2, 1] = 1
    t = icsd.cross_sample_similarity(y[:2].double())[0, 1]
    loss, *_ = loss_and_gradients("mse", [x, y], "feature", backend=fused_backend)
    torch.testing.assert_close(loss.double(), (1 - t) ** 2 / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_results_do_not_depend_on_threads(regime, case, fused_backend):
    stages = features(1500, 40, 30, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(case, stages, regime, backend=fused_backend))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(("regime", "case"), [("feature", "mse"), ("streamed", "kl"), ("streamed", "dist")])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_opcheck(regime, case, batch, fused_backend):
    stages = features(9, 6, 5, 7, batch=batch, dtype=torch.float32)
    loss = LOSSES[case]
    spec = Spec(loss.name, loss.kernel_parameters(), (1.0, 0.5), 1e-8, teacher_gradient=True, regime=regime)
    for save in (True, False):
        torch.library.opcheck(torch.ops.icsd.distill.default, (stages, save, *spec, fused_backend))
    value, saved = torch.ops.icsd.distill(stages, True, *spec, fused_backend)
    assert saved.shape == registry.get(fused_backend).saved_shape(stages, spec)
    assert saved.dtype == saved_dtype(stages, spec)
    arguments = (
        torch.ones_like(value),
        saved,
        [stage.detach() for stage in stages],
        [True, False, True],
        *spec,
        fused_backend,
    )
    torch.library.opcheck(torch.ops.icsd.distill_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("regime", "case"), [("feature", "mse"), ("streamed", "kl")])
def test_compile_fullgraph(regime, case, dynamic, fused_backend):
    def step(*stages):
        return icsd.interstage_distillation_loss(stages, LOSSES[case], detach_teacher=False, backend=fused_backend)

    with force_regime(regime):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n in (40, 50):
            stages = features(n, 6, 9, dtype=torch.float32)
            results = []
            for call in (step, compiled):
                loss = call(*stages)
                results.append([loss, *torch.autograd.grad(loss, stages)])
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
