"""Losses of similarities to banks by the CUDA kernels in the emulator."""

import itertools
import platform

import pytest
import torch
from conformance.accuracy import DTYPES, bound, relative_error
from conformance.banks import (  # noqa: F401
    ALL,
    LOSSES,
    NONE,
    PASSES,
    STUDENT,
    features,
    from_whole_matrices,
    loss_of,
    test_accumulates_in_float32,
    test_bad_samples_spoil_their_group_alone,
    test_gradcheck_and_gradgradcheck,
    test_large_exponents_in_float32,
    test_many_upstream_gradients_at_once,
    test_one_bank_of_all_groups_for_student_and_teacher,
    test_scaled_float16_gradients_do_not_underflow,
    value_and_gradients,
)
from emulated import PARTIAL_GRADIENT_BYTES
from inputs import normal

from icsd import _native as native
from icsd.losses import KL, MSE, SmoothL1

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
EVERY_ARCHITECTURE = ["test_as_accurate_as_pytorch", "test_every_kernel_of_banks", "test_gaps_in_memory_are_not_read"]


@pytest.mark.parametrize(("loss", "groups", "wanted"), PASSES, ids=str)
def test_same_as_whole_matrices(loss, groups, wanted, backend):
    tensors = features(*groups, n=6, m=37)
    expected = from_whole_matrices(tensors, wanted, loss, 1.2)
    got = value_and_gradients(tensors, wanted, loss, reduction="none", eps=1.2, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def irregular(n, m, dtype, *groups, dims=(131, 20)):
    """Return features of different scales, whose banks are like them in part, with samples of zeros."""
    student, teacher = (normal(*groups, n, dim, seed=k) for k, dim in enumerate(dims))
    banks = [normal(*groups, m, dim, seed=2 + k) for k, dim in enumerate(dims)]
    for bank, x in zip(banks, (student, teacher), strict=True):
        bank[..., : n - 1, :] = 0.3 * bank[..., : n - 1, :] + x[..., 1:, :]
        bank[..., n + 1, :] = 0
        x[..., 2, :] = 0
    student *= 3
    banks[0][..., ::3, :] *= 0.05
    return [x.to(dtype) for x in (student, teacher, *banks)]


@pytest.fixture
def one_split(emulated):
    """Let partial gradients have no more than one split."""
    emulated.kernels.set_partial_gradient_bytes(1)
    yield
    emulated.kernels.set_partial_gradient_bytes(PARTIAL_GRADIENT_BYTES)


def check_accuracy(tensors, loss, backend, wanted=ALL):
    """Check that the errors of loss and gradients are at most twice PyTorch's."""
    truth, *results = [
        value_and_gradients(inputs, wanted, loss, reduction="none", backend=name)
        for name, inputs in (("reference", [x.double() for x in tensors]), ("reference", tensors), (backend, tensors))
    ]
    for exact, of_pytorch, got in zip(*((value, *gradients) for value, gradients in (truth, *results)), strict=True):
        assert got.dtype == of_pytorch.dtype
        assert relative_error(got, exact) <= bound(got.dtype, relative_error(of_pytorch, exact))


@pytest.mark.parametrize(("loss", "n"), [(MSE("teacher"), 67), (KL(0.1, 0.07), 67), (SmoothL1(0.2, 0.03), 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_pytorch(dtype, loss, n, backend):
    """67 queries have two tiles, the banks several tiles of one split or two; the last ones are not full."""
    m = 300 if dtype == torch.float64 else 1043
    check_accuracy(irregular(n, m, dtype), loss, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_derivatives_are_not_rounded(dtype, backend):
    """Those of a row have the sum 0, so a feature that is large in all of the bank cancels. Rounding errors do not."""
    tensors = [normal(n, 40, seed=k) for k, n in enumerate((9, 9, 200, 200))]
    tensors[0][:, 0] = 0
    tensors[2][:, 0] = 1024
    check_accuracy([x.to(dtype) for x in tensors], KL(), backend, STUDENT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_multiples_of_8_features(dtype, backend):
    """Those of one split are made where the result goes, unless they are rounded there."""
    check_accuracy(irregular(9, 140, dtype, 2, dims=(8, 264)), MSE("both"), backend)


@pytest.mark.usefixtures("one_split")
def test_partial_gradients_of_one_split(backend):
    check_accuracy(irregular(9, 1043, torch.float32, dims=(16, 33)), KL(), backend)


@pytest.mark.parametrize("wanted", [*itertools.product([False, True], repeat=4)], ids=str)
def test_gradients_that_are_wanted(wanted, backend):
    tensors = irregular(5, 20, torch.float32, 3, dims=(7, 9))
    for loss in (KL(0.5), MSE()):
        check_accuracy(tensors, loss, backend, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gaps_in_memory_are_not_read(dtype, backend):
    def with_nan_around(x):
        padded = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 5), torch.nan, dtype=dtype)
        padded[..., 1:-1, 2:-3] = x
        return padded[..., 1:-1, 2:-3]

    tensors = irregular(5, 70, dtype, 2, dims=(9, 40))
    results = []
    for inputs in (tensors, [with_nan_around(x) for x in tensors]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = loss_of(leaves, KL(0.3), reduction="none", backend=backend)
        results.append((value, *torch.autograd.grad(value, leaves, torch.tensor([1.0, -2.0], dtype=value.dtype))))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", [MSE(), KL()], ids=str)
def test_any_schedule_gives_the_same_bits(loss, dtype, emulated, schedule):
    tensors = irregular(10, 300 if dtype == torch.float64 else 1043, dtype, dims=(5, 40))
    results = []
    for seed in range(2):
        emulated.library.emulator_seed(seed)
        value, gradients = value_and_gradients(tensors, ALL, loss, backend=emulated.name)
        results.append((value, *gradients))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_dtypes_may_differ(backend):
    dtypes = torch.float32, torch.float64, torch.float16, torch.float32
    tensors = [x.to(dtype) for x, dtype in zip(features(), dtypes, strict=True)]
    got = value_and_gradients(tensors, ALL, KL(0.3), backend=backend)
    expected = from_whole_matrices(tensors, ALL, KL(0.3), 1e-8)
    assert got[0].dtype == torch.float64
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    for gradient, want in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-2 if want.dtype == torch.float16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_banks(dtype, backend):
    """Run all launches, small enough for the slowest mode."""
    for loss in (KL(), MSE(), SmoothL1(0.1)):
        value, gradients = value_and_gradients(irregular(5, 140, dtype, dims=(3, 34)), ALL, loss, backend=backend)
        assert all(x.isfinite().all() for x in (value, *gradients))


@pytest.mark.parametrize(("loss", "wanted", "launches"), [("mse", STUDENT, 4), ("kl", STUDENT, 5), ("kl", NONE, 3)])
def test_few_launches(loss, wanted, launches, emulated, schedule):
    before = emulated.kernels.launches()
    value_and_gradients(features(), wanted, loss, backend=emulated.name)
    assert emulated.kernels.launches() - before == launches


def test_samples_in_the_same_memory_are_told_apart(emulated, schedule):
    """Norms are made once for samples that student and teacher share: at the same address, with the same strides."""
    x = torch.randn(40, 8)
    spec = native.Spec("mse", [0.0, 1.0], [1.0], 1e-8, False, "streamed")
    for inputs in ((x[:5], x[:5], x, x), (x[:5], x[:10:2], x[:20], x[::2]), (x[:5], x[1:6], x, x.flip(0))):
        value, _ = emulated.kernels.distill_to_banks(inputs, [False] * 4, spec)
        s, t = (torch.cosine_similarity(a[:, None], b, dim=-1) for a, b in (inputs[::2], inputs[1::2]))
        torch.testing.assert_close(value, (s - t).square().mean(), rtol=1e-4, atol=1e-7)


def test_unsuitable_arguments_are_refused(emulated):
    def call(*inputs, loss=("mse", [0.0, 1.0]), wanted=4):
        spec = native.Spec(*loss, [1.0], 1e-8, False, "streamed")
        emulated.kernels.distill_to_banks(inputs, [False] * wanted, spec)

    x, bank = torch.ones(4, 6), torch.ones(9, 6)
    for arguments, options, match in (
        ((x, x, bank), {}, "for student, teacher and two banks"),
        ((x, x, bank, bank), {"wanted": 3}, "for student, teacher and two banks"),
        ((x, x, bank, bank[:, :5]), {}, "as many features"),
        ((x, x[:3], bank, bank), {}, "agree in all but the last dimension"),
        ((x[None].repeat(2, 1, 1),) * 2 + (bank, bank), {}, "as many groups"),
        ((x, x, bank[:0], bank[:0]), {}, "must have samples"),
        ((x, x.double(), bank, bank.double()), {}, "of one type"),
        ((x, x, bank, bank), {"loss": ("pkt", [1.0])}, "banks take mse, kl and smooth_l1, got pkt"),
        ((x, x, bank, bank), {"loss": ("mse", [0.0, 0.0])}, "no diagonal to leave out"),
    ):
        with pytest.raises(ValueError, match=match):
            call(*arguments, **options)
