"""The regimes of many samples, forced upon few: each agrees with the definition, and with the others, to rounding."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import icsd
from icsd import _native
from icsd.losses import CC, DIST, KL, MSE, PKT, SP, SmoothL1
from icsd.ops.contract import Spec, saved_dtype, saved_shape
from icsd.ops.regimes import choose_regime, force_regime

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
    """Stages that have something in common."""
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
        return icsd.interstage_distillation_loss(
            stages, LOSSES[case], **{"detach_teacher": False, "backend": "cpu"} | options
        )


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


def test_every_kernel_is_covered():
    assert {loss.name for loss in LOSSES.values()} == set(_native.LOSSES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("regime", "case"), CASES)
def test_definition(regime, case, shape, dtype):
    stages = features(*shape, shape[1] + 2, dtype=dtype)
    weights = [shape[0]] * 2  # for gradients that float16 holds
    results = loss_and_gradients(case, stages, regime, weights=weights)
    wide = [stage.double() for stage in stages]
    # Gradients are differences, with the rounding of what they are differences of.
    expected = loss_and_gradients(case, wide, "sample", backend="reference", weights=weights)
    assert_close(results, expected, 8 * EPS[dtype])


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_boundaries_agree(regime, case):
    stages = features(700, 40, 30, 50, dtype=torch.float32)
    sample = loss_and_gradients(case, stages, "sample", weights=[0.5, 2.0])
    assert_close(loss_and_gradients(case, stages, regime, weights=[0.5, 2.0]), sample, 8e-6)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_groups_and_weights(regime, case):
    stages = features(9, 6, 5, 7, batch=(2, 3))
    options = {"weights": [0.5, -2.0], "reduction": "none"}
    assert_close(
        loss_and_gradients(case, stages, regime, **options),
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
def test_layouts(regime, case, layout):
    x, y = (stage.detach() for stage in features(250, 21, 18, dtype=torch.float32))
    x = LAYOUTS[layout](x)
    results = [loss_and_gradients(case, [z, y], regime) for z in (x, x.clone(memory_format=torch.contiguous_format))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_gradcheck_and_gradgradcheck(regime, case):
    stages = features(4, 3, 2, 5, batch=(2,))

    def loss(*stages):
        return loss_of(case, stages, regime, weights=[0.7, 1.3], reduction="none")

    with force_regime(regime):
        assert torch.autograd.gradcheck(loss, stages)
        assert torch.autograd.gradgradcheck(loss, stages)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_many_gradients_at_once(regime, case):
    stages = features(5, 4, 3, batch=(2,))
    loss = loss_of(case, stages, regime, reduction="none")
    batched = torch.autograd.grad(
        loss, stages, torch.eye(2, dtype=loss.dtype), is_grads_batched=True, retain_graph=True
    )
    for k in range(2):
        one = torch.autograd.grad(loss[k], stages, retain_graph=True)
        torch.testing.assert_close([gradient[k] for gradient in batched], list(one))


@pytest.mark.parametrize("regime", ["feature", "streamed"])
def test_clamped_norms(regime):
    stages = features(5, 4, 6)
    with torch.no_grad():
        stages[0][2] *= 0.02
        stages[1][3] = 0
    assert (stages[0].norm(dim=1) < 0.8).sum() == 1
    expected = loss_and_gradients("mse", stages, "sample", backend="reference", eps=0.8)
    results = loss_and_gradients("mse", stages, regime, eps=0.8)
    assert_close(results, expected, 1e-13)
    assert results[2][3].eq(0).all()


@pytest.mark.parametrize(("regime", "case"), CASES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (3, 0), (2, 0, 3), (0, 4, 3)], ids=str)
def test_degenerate_shapes(regime, case, shape):
    stages = [torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)]
    results = loss_and_gradients(case, stages, regime, reduction="none")
    expected = loss_and_gradients(case, stages, "sample", backend="reference", reduction="none")
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degenerate", [torch.zeros_like, lambda x: x[:1].expand_as(x)], ids=["zero", "constant"])
@pytest.mark.parametrize(("regime", "case"), CASES)
def test_collapsed_features(regime, case, degenerate):
    x, y = (stage.detach() for stage in features(230, 9, 5, dtype=torch.float32))
    for student, teacher in ((degenerate(x), y), (x, degenerate(y)), (degenerate(x), degenerate(y))):
        results = loss_and_gradients(case, [student, teacher], regime)
        expected = loss_and_gradients(case, [student.double(), teacher.double()], "sample", backend="reference")
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("regime", "case"), CASES)
def test_nan_and_inf_are_not_hidden(regime, case, value):
    stages = [stage.detach() for stage in features(300, 9, 5, batch=(2,), dtype=torch.float32)]
    for stage in range(2):
        damaged = [x.clone() for x in stages]
        damaged[stage][1, 250, 3] = value
        loss = loss_of(case, damaged, regime, reduction="none")
        assert loss.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(("regime", "case"), [case for case in CASES if "kl" not in case])  # its temperatures differ
def test_identical_features(regime, case):
    (x,) = features(400, 12, dtype=torch.float32)
    loss, gradient, _ = loss_and_gradients(case, [x, x], regime)
    assert loss == 0
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_feature_space_does_not_cancel(difference):
    """The bounds stated in docs/losses.md."""
    x, noise = features(3000, 24, 24, dtype=torch.float64)
    y = (x + difference * noise).float()
    stages = [x.float(), y]
    loss, *gradients = loss_and_gradients("mse", stages, "feature")
    expected, *true_gradients = loss_and_gradients(
        "mse", [stage.double() for stage in stages], "sample", backend="reference"
    )
    assert (loss - expected).abs() <= 1e-5 * expected
    assert_close(gradients, true_gradients, 1e-5)


def test_feature_space_sums_in_float64():
    """float32 sums of so many terms would not resolve a difference that float32 products do."""
    x = torch.ones(200_000, 2)
    y = x.clone()
    y[:, 1] = -0.7
    loss, *_ = loss_and_gradients("mse", [x, y], "feature")
    cosine = icsd.cross_sample_similarity(torch.stack([x[0], y[0]]))[0, 1]
    assert loss < 1e-12  # all samples are alike in both, whatever they are
    assert cosine < 0.5
    y[::2, 1] = 1
    t = icsd.cross_sample_similarity(y[:2].double())[0, 1]
    loss, *_ = loss_and_gradients("mse", [x, y], "feature")
    torch.testing.assert_close(loss.double(), (1 - t) ** 2 / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("regime", "case"), CASES)
def test_results_do_not_depend_on_threads(regime, case):
    stages = features(1500, 40, 30, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(case, stages, regime))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize(("regime", "case"), [("feature", "mse"), ("streamed", "kl"), ("streamed", "dist")])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_opcheck(regime, case, batch):
    stages = features(9, 6, 5, 7, batch=batch, dtype=torch.float32)
    loss = LOSSES[case]
    spec = Spec(loss.name, loss.kernel_parameters(), (1.0, 0.5), 1e-8, teacher_gradient=True, regime=regime)
    for save in (True, False):
        torch.library.opcheck(torch.ops.icsd.distill.default, (stages, save, *spec, "cpu"))
    value, saved = torch.ops.icsd.distill(stages, True, *spec, "cpu")
    assert saved.shape == saved_shape(stages, spec)
    assert saved.dtype == saved_dtype(stages, spec)
    arguments = (torch.ones_like(value), saved, [stage.detach() for stage in stages], [True, False, True], *spec, "cpu")
    torch.library.opcheck(torch.ops.icsd.distill_backward.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("regime", "case"), [("feature", "mse"), ("streamed", "kl")])
def test_compile_fullgraph(regime, case, dynamic):
    def step(*stages):
        return icsd.interstage_distillation_loss(stages, LOSSES[case], detach_teacher=False, backend="cpu")

    with force_regime(regime):
        compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n in (40, 50):
            stages = features(n, 6, 9, dtype=torch.float32)
            results = []
            for call in (step, compiled):
                loss = call(*stages)
                results.append([loss, *torch.autograd.grad(loss, stages)])
            torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_choice():
    def choice(offered, *shape):
        return choose_regime(offered, [torch.empty(shape, device="meta")] * 2)

    everything = ("sample", "feature", "streamed")
    assert choice(everything, 64, 65536) == "sample"
    assert choice(everything, 1_000_000, 128) == "feature"
    assert choice(("sample", "streamed"), 65536, 256) == "streamed"
    assert choice(("sample", "streamed"), 1024, 256) == "sample"
    assert choice(("sample", "streamed"), 100, 1024, 256) == "streamed"
    assert choice(("sample",), 65536, 256) == "sample"
    with force_regime("streamed"):
        assert choice(everything, 4, 8) == "streamed"
        assert choice(("sample",), 4, 8) == "sample"


MEASURE = """
import resource, sys
import torch
import icsd
from icsd.ops.regimes import force_regime
n, width, case = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
x, y = torch.randn(2, n, width)
x.requires_grad_()
def step(n):
    icsd.similarity_distillation_loss(x[:n], y[:n], case, backend="cpu").backward()
step(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted in other units elsewhere")
@pytest.mark.parametrize(("n", "width", "case"), [(200_000, 32, "mse"), (12_000, 16, "kl"), (12_000, 16, "dist")])
def test_memory(n, width, case):
    """Far below one N x N matrix: a few copies of the features and what a square of blocks takes."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n), str(width), case],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 6 * n * max(width, 48) * 4 + (64 << 20) < n * n * 4
