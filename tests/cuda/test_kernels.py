"""The CUDA backend in the emulator gives right results under hostile schedules.

With ICSD_EMULATOR_MODE and ICSD_EMULATOR_BLOCKS it does so under a sanitizer (harness.py).
"""

import os
import platform
import zlib

import pytest
import test_accuracy as accuracy
import test_regimes as regimes
import torch
from emulated import EmulatedBackend

import icsd
from icsd import _native as native
from icsd.losses import KL
from icsd.ops import registry
from icsd.ops.regimes import force_regime

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")

ROW_BLOCK_BYTES = 64 << 20  # of csrc/cuda/operator.h
SHAPES = [shape for shape in accuracy.SHAPES if shape[0] <= 130]
EVERY_ARCHITECTURE = pytest.mark.parametrize("emulated", [75, 80], ids="sm_{}".format, indirect=True)


@pytest.fixture(scope="module", params=[80], ids="sm_{}".format)
def emulated(request):
    backend = EmulatedBackend(os.environ.get("ICSD_EMULATOR_MODE", "plain"), request.param)
    registry.register(backend)
    yield backend
    del registry._backends[backend.name]


@pytest.fixture(autouse=True)
def schedule(request, emulated):
    """Another hostile order for every test, the same in every run."""
    emulated.library.emulator_seed(zlib.crc32(request.node.name.encode()))
    emulated.library.emulator_concurrent_blocks(os.environ.get("ICSD_EMULATOR_BLOCKS") == "concurrent")


@pytest.fixture
def in_place_of_the_cpu(monkeypatch, emulated):
    """Tests of the CPU backend run on the emulated one."""
    monkeypatch.setitem(registry._backends, "cpu", emulated)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_similarity(shape, dtype):
    accuracy.test_similarity(shape, dtype, "emulated")


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize("loss", accuracy.LOSSES, ids=repr)
def test_losses_and_gradients(loss, dtype, monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPES", SHAPES)
    accuracy.test_losses_and_gradients(loss, dtype, "emulated")


@pytest.mark.parametrize("scale", [1e-12, 1e4, 1e16])
def test_huge_and_tiny_norms(scale):
    accuracy.test_huge_and_tiny_norms(KL(), scale, "emulated")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", accuracy.DTYPES[::2], ids=str)
def test_nan_stays_in_its_row_and_column(dtype, value):
    accuracy.test_nan_stays_in_its_row_and_column((35, 70), dtype, value, "emulated")


@pytest.mark.parametrize("loss", ["mse", "kl", "smooth_l1"])
def test_degenerate_input(loss, in_place_of_the_cpu):
    for shape in [(0, 5), (1, 5), (5, 0), (2, 0, 3), (0, 4, 3), (1, 1, 1)]:
        accuracy.test_degenerate_shapes(shape, loss, "emulated")
        regimes.test_degenerate_shapes("streamed", loss, shape)
    accuracy.test_single_sample_without_its_diagonal(loss, "emulated")
    accuracy.test_zero_rows(16, loss, "emulated")
    accuracy.test_overflowing_norm_is_loud("emulated")


def test_mixed_dtypes():
    accuracy.test_mixed_dtypes("emulated")


# How a batch may lie in memory, and how far from 16-byte boundaries.
LAYOUTS = {
    **accuracy.LAYOUTS,
    **{f"{skip} elements in": lambda x, skip=skip: shifted(x, skip, 0) for skip in (2, 4, 8)},
    **{f"rows {gap} apart": lambda x, gap=gap: shifted(x, 0, gap) for gap in (2, 4, 6, 8, 14)},
}


def shifted(x, skip, gap):
    """`x` in memory of NaN, from element `skip` on, its rows `gap` elements apart: what is read around them shows."""
    n, d = x.shape
    memory = torch.full((skip + n * (d + gap) + 64,), torch.nan, dtype=x.dtype)
    view = memory[skip : skip + n * (d + gap)].view(n, d + gap)[:, :d]
    return view.copy_(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_layouts_are_as_their_contiguous_copies(layout, dtype):
    x = LAYOUTS[layout](accuracy.features(9, 210, dtype, 3))
    teacher = accuracy.features(9, 100, dtype, 4)
    results = []
    for student in (x.detach(), x.detach().clone(memory_format=torch.contiguous_format)):
        student.requires_grad_()
        loss = icsd.similarity_distillation_loss(student, teacher, "kl", backend="emulated")
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def interstage(stages, **options):
    """The loss and all gradients, the teacher's included, of fresh copies of the stages."""
    stages = [stage.detach().requires_grad_() for stage in stages]
    loss = icsd.interstage_distillation_loss(stages, detach_teacher=False, backend="emulated", **options)
    return loss.detach(), *torch.autograd.grad(loss, stages)


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("regime", "loss"), [("sample", "mse"), ("sample", "kl"), ("sample", "smooth_l1"), ("feature", "mse")]
)
def test_any_schedule_gives_the_same_bits(regime, loss, dtype, emulated):
    stages = [torch.randn(2, 35, d).to(dtype) for d in (40, 530 if regime == "sample" else 130, 70)]
    results = []
    for seed in range(5):
        emulated.library.emulator_seed(seed)
        with force_regime(regime):
            results.append(interstage(stages, loss=loss))
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("regime", "loss"), [("sample", "mse"), ("sample", "kl"), ("sample", "smooth_l1"), ("feature", "mse")]
)
def test_derivatives_in_float64(regime, loss):
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 2, dtype=torch.float64)
    inputs = x.requires_grad_(), y.requires_grad_()

    def value(x, y):
        return icsd.similarity_distillation_loss(x, y, loss, detach_teacher=False, backend="emulated")

    with force_regime(regime):
        assert torch.autograd.gradcheck(value, inputs)
        assert torch.autograd.gradgradcheck(value, inputs)


@pytest.fixture
def narrow_bands(emulated):
    """As few rows at a time as can be, where matrices are streamed."""
    emulated.kernels.set_row_block_bytes(1)
    yield
    emulated.kernels.set_row_block_bytes(ROW_BLOCK_BYTES)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize(("regime", "case"), [("sample", case) for case in regimes.LOSSES] + regimes.CASES)
def test_regimes_are_as_defined(regime, case, dtype, narrow_bands):
    for n, d in ((5, 7), (70, 33)):
        stages = regimes.features(n, d, d + 5, d + 2, batch=(2,), dtype=dtype)
        options = {"weights": [n] * 2}  # for gradients that float16 holds
        results = regimes.loss_and_gradients(case, stages, regime, backend="emulated", **options)
        wide = [stage.double() for stage in stages]
        expected = regimes.loss_and_gradients(case, wide, "sample", backend="reference", **options)
        regimes.assert_close(results, expected, 8 * regimes.EPS[dtype])


@EVERY_ARCHITECTURE
@pytest.mark.parametrize(
    ("case", "rows", "dtype"),
    [("kl", 100, torch.float32), ("kl", 250, torch.float32), ("kl", 250, torch.float64), ("mse", 100, torch.bfloat16)],
    ids=str,
)
def test_several_bands(case, rows, dtype, emulated):
    """Of one range of samples or more; the last has fewer rows."""
    stages = regimes.features(290, 20, 9, 14, dtype=dtype)
    options = {"weights": [290] * 2}
    wide = [stage.double() for stage in stages]
    expected = regimes.loss_and_gradients(case, wide, "sample", backend="reference", **options)
    launches = []
    for row_block_bytes in (ROW_BLOCK_BYTES, 3 * 320 * rows * (8 if dtype == torch.float64 else 4)):
        emulated.kernels.set_row_block_bytes(row_block_bytes)
        before = emulated.kernels.launches()
        try:
            results = regimes.loss_and_gradients(case, stages, "streamed", backend="emulated", **options)
        finally:
            emulated.kernels.set_row_block_bytes(ROW_BLOCK_BYTES)
        launches.append(emulated.kernels.launches() - before)
        regimes.assert_close(results, expected, 8 * regimes.EPS[dtype])
    # Each band is made and measured, and once more made, turned into gradients and multiplied.
    one, several = launches
    assert several >= one + 5


FEATURE_SPACE = "feature", "mse"
FEATURE_SPACE_TESTS = {
    "several ranges of samples and features": lambda: regimes.test_boundaries_agree(*FEATURE_SPACE),
    "groups and weights": lambda: regimes.test_groups_and_weights(*FEATURE_SPACE),
    "clamped norms": lambda: regimes.test_clamped_norms("feature"),
    "the same features": lambda: regimes.test_identical_features(*FEATURE_SPACE),
    **{
        f"degenerate {shape}": lambda shape=shape: regimes.test_degenerate_shapes(*FEATURE_SPACE, shape)
        for shape in [(0, 5), (1, 5), (3, 0), (2, 0, 3), (0, 4, 3)]
    },
    **{
        f"{name} features": lambda collapse=collapse: regimes.test_collapsed_features(*FEATURE_SPACE, collapse)
        for name, collapse in {"zero": torch.zeros_like, "constant": lambda x: x[:1].expand_as(x)}.items()
    },
    **{
        f"{value}": lambda value=value: regimes.test_nan_and_inf_are_not_hidden(*FEATURE_SPACE, value)
        for value in (torch.nan, torch.inf)
    },
    **{
        f"difference {difference}": lambda difference=difference: regimes.test_feature_space_does_not_cancel(difference)
        for difference in (1e-1, 1e-3, 1e-5)
    },
}


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("name", FEATURE_SPACE_TESTS)
def test_feature_space(name, in_place_of_the_cpu):
    FEATURE_SPACE_TESTS[name]()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_layouts_in_feature_space(layout, dtype):
    x = LAYOUTS[layout](accuracy.features(9, 210, dtype, 3))
    teacher = accuracy.features(9, 34, dtype, 4)
    results = [
        regimes.loss_and_gradients("mse", [student, teacher], "feature", backend="emulated")
        for student in (x, x.clone(memory_format=torch.contiguous_format))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert results[0][1].isfinite().all()


def test_feature_space_takes_float64_where_a_single_group_cancels():
    """The error of float32 there, beside a group where it would do."""
    x, y = (stage.detach().float() for stage in regimes.features(300, 20, 20, batch=(2,)))
    y[1] = x[1] + 1e-4 * y[1]
    results = regimes.loss_and_gradients("mse", [x, y], "feature", backend="emulated", reduction="none")
    wide = [x.double(), y.double()]
    expected = regimes.loss_and_gradients("mse", wide, "sample", backend="reference", reduction="none")
    for group in range(2):
        regimes.assert_close([r[group] for r in results], [e[group] for e in expected], 2e-6)


def test_feature_space_of_mixed_types():
    x, y, z = regimes.features(40, 12, 9, 7)
    stages = [x.detach().bfloat16(), y.detach(), z.detach().half()]
    results = regimes.loss_and_gradients("mse", stages, "feature", backend="emulated")
    assert [result.dtype for result in results[1:]] == [stage.dtype for stage in stages]
    expected = regimes.loss_and_gradients("mse", [s.double() for s in stages], "sample", backend="reference")
    regimes.assert_close(results, expected, 2 * regimes.EPS[torch.bfloat16])


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_every_kernel(dtype, narrow_bands):
    """All launches of one training step, small enough for the slowest mode."""
    for n, d in ((3, 2), (17, 50), (35, 70)):
        stages = [accuracy.features(n, width, dtype, width) for width in (d, d + 3, d)]
        for loss in ("mse", "kl", "smooth_l1"):
            assert all(result.isfinite().all() for result in interstage(stages, loss=loss))
        with force_regime("streamed"):
            assert all(result.isfinite().all() for result in interstage(stages, loss="kl"))
    with force_regime("feature"):
        assert all(result.isfinite().all() for result in interstage(stages, loss="mse"))
    assert icsd.cross_sample_similarity(torch.randn(2, 35, 70).to(dtype), backend="emulated").isfinite().all()


@pytest.mark.parametrize(
    ("regime", "dtype", "most"),
    [("sample", torch.float32, 4), ("feature", torch.float32, 9), ("feature", torch.float64, 5)],
)
def test_few_launches_for_all_stages(regime, dtype, most, emulated):
    stages = [torch.randn(16, d, dtype=dtype) for d in (64, 256, 1024 if regime == "sample" else 10, 100)]
    before = emulated.kernels.launches(), emulated.library.emulator_launches()
    with force_regime(regime):
        interstage(stages, loss="mse")
    assert emulated.kernels.launches() - before[0] == emulated.library.emulator_launches() - before[1] <= most


def test_unsuitable_arguments_are_refused(emulated):
    x, saved = torch.ones(4, 6), torch.ones(3, 4, 5)
    spec = native.Spec("mse", [], [1.0, 1.0], 1e-8, False, "sample")
    with pytest.raises(ValueError, match="grad is not of the compute type"):
        emulated.kernels.distill_backward(torch.ones(()), saved, [x.double(), x], [False, False], spec)
    for regime, match in (("feature", "inputs of one type"), ("streamed", "float64 with float64 only")):
        spec = native.Spec("mse", [], [1.0, 1.0], 1e-8, False, regime)
        with pytest.raises(ValueError, match=match):
            emulated.kernels.distill([x.double(), x, x], spec, True)
    with pytest.raises(ValueError, match="at most 32 inputs, got 33"):
        emulated.kernels.distill([x] * 33, native.Spec("mse", [], [1.0] * 32, 1e-8, False, "sample"), True)
