"""What interpreted kernels do to memory; run by test_interpreted.py."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import traced
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from triton.runtime.interpreter import InterpreterBuilder

import icsd
from icsd.ops.regimes import force_regime
from icsd.ops.triton import kernels, launch, streamed


class Trace:
    """Every access of every program of every launch.

    Attributes:
        loads: `(launch, program, addresses, bytes of an element)`; of what masks let through.
        stores: The same.
        given: For every launch, the address ranges of the tensors it was given.
    """

    def __init__(self):
        self.loads, self.stores, self.given = [], [], []

    def bytes(self, accesses, tensor):
        """How many bytes of a tensor were accessed."""
        begin, end = extent(tensor)
        return sum(int(((at >= begin) & (at < end)).sum()) * size for _, _, at, size in accesses)

    def check(self):
        """No access out of bounds, and no two programs of a launch at the same address if one of them writes."""
        for launched, _, at, _ in self.loads + self.stores:
            inside = np.zeros(at.shape, bool)
            for begin, end in self.given[launched]:
                inside |= (at >= begin) & (at < end)
            assert inside.all()
        for launched in range(len(self.given)):
            stored, writers = programs(self.stores, launched)
            stored, first = np.unique(stored, return_index=True)
            for accesses in (self.stores, self.loads):
                at, by = programs(accesses, launched)
                if stored.size:
                    found = np.searchsorted(stored, at).clip(max=stored.size - 1)
                    assert ((stored[found] != at) | (writers[first][found] == by)).all()


def programs(accesses, launched):
    """The addresses of a launch, and the programs that accessed them."""
    of_launch = [(at, program) for number, program, at, _ in accesses if number == launched]
    at = [at.ravel() for at, _ in of_launch]
    by = [np.full(at.size, x + (y << 40)) for at, (x, y, _) in of_launch]
    return np.concatenate([*at, np.empty(0, np.uint64)]), np.concatenate([*by, np.empty(0, np.int64)])


def extent(tensor):
    """The addresses from a tensor's first element to its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.fixture
def trace(monkeypatch):
    """Records what kernels access, and hands them NaN for fresh memory, with NaN around it."""
    found = Trace()

    def record(name, accesses, mask_position):
        original = getattr(InterpreterBuilder, name)

        def access(self, pointers, *arguments):
            at = pointers.data[np.broadcast_to(arguments[mask_position].data, pointers.data.shape)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            accesses.append((len(found.given) - 1, tuple(self.grid_idx), at, size))
            return original(self, pointers, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    record("create_masked_load", found.loads, 0)
    record("create_masked_store", found.stores, 1)

    def new_empty(self, *shape, dtype=None, device=None):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        return torch.full((shape.numel() + 64,), torch.nan, dtype=dtype or self.dtype)[32:-32].view(shape)

    def launched(kernel, out, grid, *arguments, **constants):
        found.given.append([extent(argument) for argument in arguments if isinstance(argument, torch.Tensor)])
        original(kernel, out, grid, *arguments, **constants)

    original = launch._launch
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(launch, "_launch", launched)
    return found


def canaries(*shape, dtype=torch.float32, seed=0):
    """Features with NaN before and behind every sample, and samples of NaN before and behind every group."""
    *groups, n, d = shape
    x = torch.full((*groups, n + 2, d + 5), torch.nan, dtype=dtype)[..., 1:-1, 2:-3]
    generator = torch.Generator().manual_seed(seed)
    x.copy_(torch.randn(shape, generator=generator) + torch.randn(d, generator=generator))
    return x


SHAPES = [(5, 7), (17, 600), (130, 20), (2, 3, 9, 40)]
REGIMES = ["sample", "feature", "streamed"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = [("mse", {}), ("kl", {"student_temperature": 0.3}), ("kl", {"include_diagonal": False}), ("smooth_l1", {})]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_programs_keep_to_their_memory(shape, regime, trace, monkeypatch):
    monkeypatch.setattr(streamed, "PANEL_BYTES", 1)
    dtype = DTYPES[(SHAPES.index(shape) + REGIMES.index(regime)) % len(DTYPES)]
    divergence, parameters = ("mse", {}) if regime == "feature" else CASES[SHAPES.index(shape) % len(CASES)]
    results = []
    for backend in ("triton", "reference"):
        stages = [canaries(*shape[:-1], shape[-1] + k, dtype=dtype, seed=k).requires_grad_() for k in range(3)]
        with force_regime(regime):
            loss = icsd.interstage_distillation_loss(
                stages,
                divergence,
                weights=[0.5, 2],
                detach_teacher=False,
                reduction="none",
                backend=backend,
                **parameters,
            )
        results.append((loss, *torch.autograd.grad(loss.sum(), stages)))
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
    ("divergence", "regime"), [("mse", "sample"), ("kl", "sample"), ("mse", "feature"), ("kl", "streamed")]
)
def test_gradcheck_and_gradgradcheck(divergence, regime):
    """Along random directions: every evaluation is interpreted."""
    stages = [torch.randn(3, d, dtype=torch.float64, requires_grad=True) for d in (2, 4, 3)]

    def loss(*stages):
        with force_regime(regime):
            return icsd.interstage_distillation_loss(stages, divergence, detach_teacher=False, backend="triton")

    assert torch.autograd.gradcheck(loss, stages, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, stages, fast_mode=True)


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
    """What `torch.compile` gets to see, with every write made a new tensor."""
    path = tmp_path / "graphs"
    script, root = Path(traced.__file__), Path(traced.__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    run = subprocess.run([sys.executable, script, path], cwd=root, env=environment, check=True, capture_output=True)
    assert b"every input is mutated" not in run.stderr, "torch did not understand a kernel"
    codes, names, constants = pickle.loads(path.read_bytes())
    kernel_side_table.id_to_kernel = {number: getattr(kernels, name) for number, name in names.items()}
    kernel_side_table.constant_args = constants
    for (shapes, divergence, parameters), code in zip(traced.CASES, codes, strict=True):
        stages = traced.inputs(shapes)
        expected = traced.loss_of(stages, divergence, parameters, "reference")
        expected_gradients = torch.autograd.grad(expected, stages)
        forward, backward = map(function_of, code)
        with torch.no_grad():
            loss, *saved = forward(None, *stages)
            gradients = backward(None, *saved, torch.ones_like(loss))
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradients, expected_gradients)


def function_of(code):
    """A graph's `forward`."""
    names = {"torch": torch, "device": torch.device}
    exec(code, names)
    return names["forward"]
