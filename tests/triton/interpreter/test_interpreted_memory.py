"""The memory that interpreted kernels access, and the graphs that torch.compile makes of them."""

import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import interpreted_launches as launches
import traced
from accesses import record
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import icsd
from icsd.losses import KL
from icsd.ops.regimes import force_regime
from icsd.ops.triton import kernels, streamed
from tools.kernel_cases import CASES as OF_THE_TABLE


@pytest.fixture
def trace(monkeypatch):
    return record(monkeypatch)


def canaries(*shape, dtype=torch.float32, seed=0):
    """Return features with NaN before and behind every sample, and samples of NaN before and behind every group."""
    *groups, n, d = shape
    x = torch.full((*groups, n + 2, d + 5), torch.nan, dtype=dtype)[..., 1:-1, 2:-3]
    generator = torch.Generator().manual_seed(seed)
    x.copy_(torch.randn(shape, generator=generator) + torch.randn(d, generator=generator))
    return x


SHAPES = [(5, 7), (17, 300), (130, 20), (2, 2, 9, 40)]
REGIMES = ["sample", "feature", "streamed"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = ["mse", KL(0.3), KL(include_diagonal=False), "smooth_l1"]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_programs_keep_to_their_memory(shape, regime, trace, monkeypatch):
    monkeypatch.setattr(streamed, "ROW_BLOCK_BYTES", 1)
    dtype = DTYPES[(SHAPES.index(shape) + REGIMES.index(regime)) % len(DTYPES)]
    loss = "mse" if regime == "feature" else CASES[SHAPES.index(shape) % len(CASES)]
    *batch, dim = shape
    dim = min(dim, 130) if regime == "feature" else dim  # three tiles of a covariance, the last one with two features
    results = []
    for backend in ("triton", "reference"):
        stages = [canaries(*batch, dim + k, dtype=dtype, seed=k).requires_grad_() for k in range(3)]
        with force_regime(regime):
            value = icsd.interstage_distillation_loss(
                stages,
                loss,
                weights=[0.5, 2],
                detach_teacher=False,
                reduction="none",
                backend=backend,
            )
        results.append((value, *torch.autograd.grad(value.sum(), stages)))
    trace.check()
    half = dtype == torch.bfloat16
    torch.testing.assert_close(results[0], results[1], rtol=2e-2 if half else 1e-4, atol=1e-3 if half else 1e-6)


@pytest.mark.parametrize("n", [3, 64, 128])
def test_features_are_read_once_and_gradients_written_once(n, trace):
    student, teacher = torch.randn(n, 1000, requires_grad=True), torch.randn(n, 500)
    loss = icsd.similarity_distillation_loss(student, teacher, backend="triton")
    assert trace.bytes(trace.loads, student) == student.numel() * 4
    assert trace.bytes(trace.loads, teacher) == teacher.numel() * 4
    trace.loads.clear()
    (gradient,) = torch.autograd.grad(loss, student)
    assert trace.bytes(trace.loads, student) == student.numel() * 4
    assert trace.bytes(trace.loads, teacher) == 0
    assert trace.bytes(trace.stores, gradient) == gradient.numel() * 4


def test_only_a_triangle_of_tiles_is_multiplied(trace):
    n, d = 384, 16
    x = torch.randn(n, d)
    icsd.cross_sample_similarity(x, backend="triton")
    tiles = n // 128
    assert trace.bytes(trace.loads, x) == tiles * (tiles + 1) // 2 * 2 * 128 * d * 4


@pytest.mark.parametrize(
    ("loss", "regime"), [("mse", "sample"), ("kl", "sample"), ("mse", "feature"), ("kl", "streamed")]
)
def test_gradcheck_and_gradgradcheck(loss, regime):
    # Only along random directions, because the interpreter is slow.
    stages = [torch.randn(3, d, dtype=torch.float64, requires_grad=True) for d in (2, 4, 3)]

    def value(*stages):
        with force_regime(regime):
            return icsd.interstage_distillation_loss(stages, loss, detach_teacher=False, backend="triton")

    assert torch.autograd.gradcheck(value, stages, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, stages, fast_mode=True)


def test_a_planted_overrun_and_a_planted_race_are_found(trace):
    x = torch.randn(20, 8)
    icsd.cross_sample_similarity(x, backend="triton")
    trace.check()
    launched, program, at, size = trace.stores[0]
    trace.stores.append((launched, program, at[-1:] + size, size))
    with pytest.raises(AssertionError):
        trace.check()
    trace.stores.pop()
    trace.loads.append((launched, (program[0] + 1, 0, 0), at[:1], size))
    with pytest.raises(AssertionError):
        trace.check()


def test_graphs_of_kernels_compute_what_the_kernels_do(tmp_path):
    # The graphs are those that `torch.compile` sees, with every write made a new tensor.
    path = tmp_path / "graphs"
    script, root = Path(traced.__file__), Path(traced.__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, script, path], cwd=root, env=environment, check=True, capture_output=True)
    assert b"every input is mutated" not in run.stderr, "torch did not understand a kernel"
    codes, names, constants = pickle.loads(path.read_bytes())
    kernel_side_table.id_to_kernel = {number: getattr(kernels, name) for number, name in names.items()}
    kernel_side_table.constant_args = constants
    for (shapes, loss), code in zip(traced.CASES, codes, strict=True):
        stages = traced.inputs(shapes)
        expected = traced.loss_of(stages, loss, "reference")
        expected_gradients = torch.autograd.grad(expected, stages)
        forward, backward = map(function_of, code)
        with torch.no_grad():
            value, *saved = forward(None, *stages)
            gradients = backward(None, *saved, torch.ones_like(value))
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(gradients, expected_gradients)


def function_of(code):
    """Return the `forward` function of a graph."""
    names = {"torch": torch, "device": torch.device}
    exec(code, names)
    return names["forward"]


@pytest.mark.parametrize("case", [*OF_THE_TABLE[:2], *launches.TO_BANKS], ids=str)
def test_launches_are_as_the_table_says(case, trace):
    found = [[name, *row] for name, of_pass in launches.count(case, trace).items() for row in of_pass.items()]
    with launches.TABLE.open() as file:
        rows = [row for row in csv.DictReader(file) if [row[field] for field in case._fields] == [*map(str, case)]]
    expected = [[row["pass"], row["kernel"], row["bytes"]] for row in rows]
    assert [[*map(str, row)] for row in found] == expected, "run: python -m tools.kernel_table --pin"
