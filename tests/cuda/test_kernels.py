"""The CUDA backend in the emulator gives right results under hostile schedules.

With ICSD_EMULATOR_MODE and ICSD_EMULATOR_BLOCKS it does so under a sanitizer (harness.py).
"""

import platform

import pytest
import torch
from conformance import accuracy, regimes
from emulated import ROW_BLOCK_BYTES

import icsd
from icsd import _native as native
from icsd.losses import LOSSES
from icsd.ops.contract import Spec
from icsd.ops.regimes import force_regime

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64"),
    pytest.mark.usefixtures("schedule"),
]

EVERY_ARCHITECTURE = ["test_regimes_are_as_defined", "test_several_row_blocks", "test_every_kernel"]


# Layouts of a batch in memory, some of them not aligned to 16 bytes.
LAYOUTS = {
    **accuracy.LAYOUTS,
    **{f"{skip} elements in": lambda x, skip=skip: shifted(x, skip, 0) for skip in (2, 4, 8)},
    **{f"rows {gap} apart": lambda x, gap=gap: shifted(x, 0, gap) for gap in (2, 4, 6, 8, 14)},
}


def shifted(x, skip, gap):
    """Return `x` in memory of NaN, from element `skip` on and with `gap` elements between rows."""
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
    """Return the loss and all gradients, the teacher's included, of fresh copies of the stages."""
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


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
@pytest.mark.parametrize(("regime", "case"), [("sample", case) for case in regimes.LOSSES] + regimes.CASES)
def test_regimes_are_as_defined(regime, case, dtype, small_row_blocks):
    for n, d in ((5, 7), (70, 33)):
        stages = regimes.features(n, d, d + 5, d + 2, batch=(2,), dtype=dtype)
        options = {"weights": [n] * 2}  # for gradients that float16 holds
        results = regimes.loss_and_gradients(case, stages, regime, backend="emulated", **options)
        wide = [stage.double() for stage in stages]
        expected = regimes.loss_and_gradients(case, wide, "sample", backend="reference", **options)
        regimes.assert_close(results, expected, 8 * regimes.EPS[dtype])


@pytest.mark.parametrize(
    ("case", "rows", "dtype"),
    [("kl", 100, torch.float32), ("kl", 250, torch.float32), ("kl", 250, torch.float64), ("mse", 100, torch.bfloat16)],
    ids=str,
)
def test_several_row_blocks(case, rows, dtype, emulated):
    """Row blocks have one tile or several, and the last one has fewer rows."""
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
    # Each row block takes a Gram and a loss kernel, then a Gram, a gradient and a combine kernel.
    one, several = launches
    assert several >= one + 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_layouts_in_feature_space(layout, dtype):
    x = LAYOUTS[layout](accuracy.features(9, 70, dtype, 3))  # a tile and a part of one
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


@pytest.mark.parametrize(("regime", "loss"), [("sample", "kl"), ("feature", "mse"), ("streamed", "kl")])
@pytest.mark.parametrize("n", [4, 5, 7])
def test_what_is_saved_has_the_shape_that_compiled_graphs_expect(n, regime, loss, emulated):
    stages = [torch.randn(2, 3, n, d) for d in (6, 9)]
    spec = Spec(loss, LOSSES[loss]().kernel_parameters(), (1.0,), 1e-8, teacher_gradient=False, regime=regime)
    _, saved = emulated.launcher.distill(stages, spec, True)
    assert saved.shape == emulated.saved_shape(stages, spec)
    assert regime == "streamed" or saved.isfinite().all()  # rows of matrices end in zeros
    if regime == "sample":
        torch.testing.assert_close(saved[-1, ..., :n], stages[-1] @ stages[-1].mT)
        assert saved.stride(-2) % 4 == 0  # so that each row can be copied by 16 bytes


@pytest.mark.parametrize("n", [4, 5])
def test_second_derivatives_with_a_teacher_that_is_not_kept(n):
    x, y = torch.randn(n, 3, dtype=torch.float64, requires_grad=True), torch.randn(n, 2, dtype=torch.float64)
    with force_regime("sample"):
        assert torch.autograd.gradgradcheck(
            lambda x: icsd.similarity_distillation_loss(x, y, "kl", backend="emulated"), x
        )


@pytest.mark.parametrize(("regime", "case"), [("feature", "mse"), ("streamed", "kl")])
def test_mixed_types(regime, case):
    x, y, z = regimes.features(40, 12, 9, 7)
    stages = [x.detach().bfloat16(), y.detach(), z.detach().half()]
    results = regimes.loss_and_gradients(case, stages, regime, backend="emulated")
    loss = regimes.LOSSES[case]
    spec = Spec(loss.name, loss.kernel_parameters(), (1.0, 1.0), 1e-8, teacher_gradient=True, regime=regime)
    value, saved = torch.ops.icsd.distill(stages, True, *spec, "emulated")
    gradients = torch.ops.icsd.distill_backward(value.new_ones(()), saved, stages, [True] * 3, *spec, "emulated")
    # Autograd would convert them; a compiled graph takes the dtypes for granted.
    assert [gradient.dtype for gradient in gradients] == [stage.dtype for stage in stages]
    expected = regimes.loss_and_gradients(case, [s.double() for s in stages], "sample", backend="reference")
    regimes.assert_close(results, expected, 2 * regimes.EPS[torch.bfloat16])


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_every_kernel(dtype, small_row_blocks, emulated):
    """Run all launches of a training step, small enough for the slowest mode."""
    for n, d in ((3, 2), (17, 50), (35, 70)):
        stages = [accuracy.features(n, width, dtype, width) for width in (d, d + 3, d)]
        for loss in ("mse", "kl", "smooth_l1"):
            assert all(result.isfinite().all() for result in interstage(stages, loss=loss))
        with force_regime("streamed"):
            assert all(result.isfinite().all() for result in interstage(stages, loss="kl"))
    near = accuracy.features(600, 3, dtype, 5)
    teacher = torch.cat([near[300:301], near[1:]])  # so near that float64 products decide, in several splits
    emulated.library.emulator_multiprocessors(7)
    with force_regime("feature"):
        for of_case in (stages, [near, teacher]):
            assert all(result.isfinite().all() for result in interstage(of_case, loss="mse"))
    assert icsd.cross_sample_similarity(torch.randn(2, 35, 70).to(dtype), backend="emulated").isfinite().all()


@pytest.mark.parametrize(
    ("regime", "dtype", "most"),
    [("sample", torch.float32, 4), ("feature", torch.float32, 5), ("feature", torch.float64, 5)],
)
def test_few_launches_for_all_stages(regime, dtype, most, emulated):
    stages = [torch.randn(16, d, dtype=dtype) for d in (64, 256, 1024 if regime == "sample" else 10, 100)]
    before = emulated.kernels.launches(), emulated.library.emulator_launches()
    with force_regime(regime):
        interstage(stages, loss="mse")
    assert emulated.kernels.launches() - before[0] == emulated.library.emulator_launches() - before[1] <= most


@pytest.mark.parametrize(
    ("regime", "loss", "center"),
    [("sample", "kl", False), ("sample", "kl", True), ("streamed", "kl", False), ("feature", "mse", False)],
)
def test_all_launches_but_the_first_are_early(regime, loss, center, emulated, small_row_blocks):
    """The emulator fails where a thread of an early launch does not wait for the one before."""
    second = torch.bfloat16 if regime != "feature" and not center else torch.float32  # a launch for each type
    stages = [torch.randn(70, 9).to(dtype).requires_grad_() for dtype in (torch.float32, second, torch.float32)]
    library = emulated.library
    begin = library.emulator_launches()
    with force_regime(regime):
        value = icsd.interstage_distillation_loss(stages, loss, center=center, detach_teacher=False, backend="emulated")
    middle = library.emulator_launches()
    torch.autograd.grad(value, stages)
    end = library.emulator_launches()
    assert middle >= begin + 3
    late = [number for number in range(begin, end) if not library.emulator_launch_early(number)]
    assert late == ([begin, middle] if regime == "streamed" else [begin])


@pytest.mark.parametrize("gap", [0, 2])
def test_a_matrix_that_does_not_fit_in_shared_memory_makes_two_bfloat16_terms(gap, emulated):
    matrix, x = torch.randn(150, 290 + gap), accuracy.features(290 + gap, 140, torch.bfloat16, 3)
    out = emulated.kernels.combine(matrix, x)
    expected = (matrix.double() @ x.double()).bfloat16()
    assert (out == expected).double().mean() > 0.95  # one term would leave hardly half of them


def test_bfloat16_gradients_beside_a_float64_stage(emulated):
    """The matrix is float64 and does not fit in shared memory."""
    stages = accuracy.features(290, 20, torch.bfloat16, 3), accuracy.features(290, 9, torch.float64, 4)
    results = regimes.loss_and_gradients("kl", stages, "sample", backend="emulated", weights=[290])
    expected = regimes.loss_and_gradients(
        "kl", [s.double() for s in stages], "sample", backend="reference", weights=[290]
    )
    regimes.assert_close(results, expected, 2 * regimes.EPS[torch.bfloat16])


def test_unsuitable_arguments_are_refused(emulated):
    x, saved = torch.ones(4, 6), torch.ones(3, 4, 5)
    spec = native.Spec("mse", [0.0, 1.0], [1.0, 1.0], 1e-8, False, "sample")
    with pytest.raises(ValueError, match="grad is not of the compute type"):
        emulated.kernels.distill_backward(torch.ones(()), saved, [x.double(), x], [False, False], spec)
    for regime, match in (("feature", "inputs of one type"), ("streamed", "float64 with float64 only")):
        spec = native.Spec("mse", [0.0, 1.0], [1.0, 1.0], 1e-8, False, regime)
        with pytest.raises(ValueError, match=match):
            emulated.kernels.distill([x.double(), x, x], spec, True)
    with pytest.raises(ValueError, match="at most 32 inputs, got 33"):
        emulated.kernels.distill([x] * 33, native.Spec("mse", [0.0, 1.0], [1.0] * 32, 1e-8, False, "sample"), True)
