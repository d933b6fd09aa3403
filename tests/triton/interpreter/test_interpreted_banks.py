"""Losses of similarities to banks by the Triton kernels in the interpreter."""

import pytest
import torch

pytest.importorskip("triton")

from accesses import record
from conformance.banks import (  # noqa: F401
    ALL,
    LOSSES,
    NONE,
    PASSES,
    STUDENT,
    features,
    from_whole_matrices,
    test_accumulates_in_float32,
    test_bad_samples_spoil_their_group_alone,
    test_large_exponents_in_float32,
    test_many_upstream_gradients_at_once,
    test_one_bank_of_all_groups_for_student_and_teacher,
    test_scaled_float16_gradients_do_not_underflow,
    value_and_gradients,
)

import icsd
from icsd.losses import KL, SmoothL1
from icsd.ops.triton import banks, runtime
from icsd.ops.triton.kernels import banks as kernels


def on_a_small_device(monkeypatch):
    """Let the banks of 37 samples be divided into two splits: two tiles, and one with five samples."""
    monkeypatch.setattr(kernels, "FEWEST_TILES", 1)
    monkeypatch.setattr(runtime, "processors", lambda _: 2)


@pytest.mark.parametrize(("loss", "groups", "wanted"), PASSES, ids=str)
def test_same_as_whole_matrices(loss, groups, wanted, monkeypatch):
    on_a_small_device(monkeypatch)
    tensors = features(*groups, n=6, m=37)
    expected = from_whole_matrices(tensors, wanted, loss, 1.2)
    trace = record(monkeypatch)
    got = value_and_gradients(tensors, wanted, loss, reduction="none", eps=1.2, backend="triton")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert trace.kernels.count("bank_gradients_kernel") == sum(wanted)
    assert trace.kernels.count("bank_summaries_kernel") == (isinstance(loss, KL) or not wanted[0])


def test_dtypes_may_differ():
    dtypes = torch.float32, torch.float64, torch.float16, torch.float32
    tensors = [x.to(dtype) for x, dtype in zip(features(), dtypes, strict=True)]
    got = value_and_gradients(tensors, ALL, KL(0.3), backend="triton")
    expected = from_whole_matrices(tensors, ALL, KL(0.3), 1e-8)
    assert got[0].dtype == torch.float64
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=0)
    for gradient, want in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-2 if want.dtype == torch.float16 else 1e-4, atol=1e-7)


@pytest.mark.parametrize(("loss", "dtype"), [(KL(0.3), torch.bfloat16), (SmoothL1(0.2, 0.1), torch.float32)], ids=str)
def test_programs_keep_to_their_memory(loss, dtype, monkeypatch):
    on_a_small_device(monkeypatch)

    def with_nan_around(x):
        padded = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 5), torch.nan, dtype=dtype)
        padded[..., 1:-1, 2:-3] = x
        return padded[..., 1:-1, 2:-3].requires_grad_()

    values = features(2, n=17, m=37, dtype=torch.float32)
    expected = from_whole_matrices([x.to(dtype) for x in values], ALL, loss, 1e-8)
    trace = record(monkeypatch)
    leaves = [with_nan_around(x) for x in values]
    value = icsd.similarity_distillation_loss(
        *leaves[:2],
        loss,
        student_bank=leaves[2],
        teacher_bank=leaves[3],
        detach_teacher=False,
        reduction="none",
        backend="triton",
    )
    gradients = torch.autograd.grad(value, leaves, torch.tensor([1.0, -2.0]))
    trace.check()
    half = dtype == torch.bfloat16
    torch.testing.assert_close((value, gradients), expected, rtol=2e-2 if half else 1e-4, atol=1e-3 if half else 1e-6)


def test_second_derivatives():
    tensors = [torch.randn(n, 3).double().requires_grad_() for n in (4, 4, 7, 7)]

    def second(value):
        (gradient,) = torch.autograd.grad(value, tensors[0], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tensors)

    losses = [
        icsd.similarity_distillation_loss(
            *tensors[:2], KL(), student_bank=tensors[2], teacher_bank=tensors[3], detach_teacher=False, backend=backend
        )
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*map(second, losses))


def test_norms_of_a_bank_that_both_have_are_made_once(monkeypatch):
    queries, bank = torch.randn(3, 8, requires_grad=True), torch.randn(20, 8)
    counts = []
    for other in (bank, bank.clone()):
        with monkeypatch.context() as patch:
            trace = record(patch)
            icsd.similarity_distillation_loss(
                queries, queries, "kl", student_bank=bank, teacher_bank=other, backend="triton"
            )
        norms = [number for number, name in enumerate(trace.kernels) if name == "inverse_norms_kernel"]
        loads = [access for access in trace.loads if access[0] in norms]
        counts.append(trace.bytes(loads, bank) + trace.bytes(loads, other) * (other is not bank))
    assert counts == [bank.numel() * 4, 2 * bank.numel() * 4]


@pytest.mark.parametrize(("queries", "dim"), [(256, 256), (16, 256), (256, 512), (16, 128)])
def test_programs_fill_a_device_of_132_multiprocessors(queries, dim, monkeypatch):
    monkeypatch.setattr(runtime, "processors", lambda _: 132)
    grids = []
    monkeypatch.setattr(
        runtime,
        "launch",
        lambda kernel, out, grid, *_, **__: grids.append((getattr(kernel, "base_fn", kernel.fn).__name__, grid)),
    )
    x, bank = torch.empty(queries, dim, device="meta"), torch.empty(65536, dim, device="meta")
    banks.distill([x, x.clone(), bank, bank], (True, False, True, False), KL(), 1e-8)
    programs = [grid[0] * grid[1] for name, grid in grids if name.startswith("bank_")]
    assert len(programs) == 3
    assert min(programs) >= 132


def test_gradients_too_wide_are_left_to_pytorch(monkeypatch):
    trace = record(monkeypatch)
    for wanted in (False, True):
        student, teacher = torch.randn(3, 513, requires_grad=wanted), torch.randn(3, 2000)
        banks_of = {"student_bank": torch.randn(4, 513), "teacher_bank": torch.randn(4, 2000)}
        icsd.similarity_distillation_loss(student, teacher, **banks_of, backend="triton")
        assert ("bank_summaries_kernel" in trace.kernels) != wanted
        trace.kernels.clear()
    assert not banks.takes([torch.empty(1, 257, dtype=torch.float64)] * 4, STUDENT)
