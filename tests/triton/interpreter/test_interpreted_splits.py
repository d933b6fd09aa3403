"""Work that is divided: columns of N x N matrices into splits, the lower triangle into chunks, features into parts."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from accesses import record

import icsd
from icsd.losses import KL, MSE, SmoothL1
from icsd.ops.contract import Spec
from icsd.ops.regimes import force_regime
from icsd.ops.triton import runtime
from icsd.ops.triton.kernels import streamed as kernels
from icsd.ops.triton.kernels.features import Features


@pytest.mark.parametrize(
    ("loss", "processors", "chunks"),
    [(KL(0.05, 0.3, include_diagonal=False), 6, 1), (KL(), 1, 3), (SmoothL1(0.2), 6, 1), (MSE("teacher"), 1, 3)],
    ids=repr,
)
def test_summaries_of_splits_and_of_mirror_images_are_merged(loss, processors, chunks, monkeypatch):
    # Two groups of three row blocks, the last one a single sample: two splits or one.
    monkeypatch.setattr(kernels, "_tile", lambda samples, dtype: 32)
    monkeypatch.setattr(kernels, "FEWEST_TILES", 1)
    monkeypatch.setattr(runtime, "processors", lambda device: processors)
    monkeypatch.setattr(kernels, "SUMMARY_BYTES", kernels.SUMMARY_BYTES if chunks == 1 else 1)
    trace = record(monkeypatch)
    stages = [torch.randn(2, 65, dim).mul_(torch.rand(2, 65, 1) + 0.1) for dim in (20, 5, 13)]
    stages[0][1, 33] = stages[2][0, 3] = 0.0
    results = []
    for backend, regime in (("triton", "streamed"), ("reference", "sample")):
        leaves = [stage.clone().requires_grad_() for stage in stages]
        with force_regime(regime):
            value = icsd.interstage_distillation_loss(
                leaves, loss, weights=[0.3, 1.7], reduction="none", detach_teacher=False, backend=backend
            )
        results.append((value.detach(), *torch.autograd.grad(value, leaves, torch.tensor([1.0, -2.0]))))
    for kernel in ("streamed_forward_kernel", "merge_triangle_kernel"):
        assert trace.kernels.count(kernel) == 2 * chunks  # of each student
    trace.check()
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float64, torch.float16)], ids=str)
def test_one_launch_adds_up_the_parts_of_all_gram_matrices(dtypes, monkeypatch):
    monkeypatch.setattr(runtime, "processors", lambda device: 4)
    trace = record(monkeypatch)
    # Two groups of one tile each: three splits, of which the second stage fills one and the others two and three.
    stages = [torch.randn(2, 5, dim).to(dtype) for dim, dtype in zip((300, 100, 900), dtypes, strict=True)]
    results = []
    for backend in ("triton", "reference"):
        leaves = [stage.clone().requires_grad_() for stage in stages]
        value = icsd.interstage_distillation_loss(
            leaves, "kl", weights=[0.3, 1.7], reduction="none", detach_teacher=False, backend=backend
        )
        results.append((value.detach(), *torch.autograd.grad(value, leaves, torch.tensor([1.0, -2.0]).to(value))))
    assert trace.kernels[:4] == ["gram_kernel"] * 3 + ["sum_grams_kernel"]
    assert trace.kernels.count("sum_grams_kernel") == 1
    trace.check()
    torch.testing.assert_close(results[0][:3], results[1][:3], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(results[0][3], results[1][3], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("samples", "splits", "chunks"), [(512, 1, [8]), (4096, 4, [64]), (20000, 1, [167, 313]), (65, 1, [2])]
)
def test_programs_fill_the_device(samples, splits, chunks, monkeypatch):
    monkeypatch.setattr(runtime, "processors", lambda device: 132)
    grids = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, out, grid, *_, **__: grids.append(grid))
    features = Features.of(torch.empty(1, samples, 8), torch.empty(1, samples))
    spec = Spec("kl", (0.1, 0.1, 1.0), (1.0,), 1e-8, False, "streamed")
    kernels.streamed_forward(features, features, torch.empty(1, samples), None, 1.0, spec)
    ends = [0, *chunks]
    expected = [((end - begin, splits), (end,)) for begin, end in itertools.pairwise(ends)]
    assert grids == [grid for pair in expected for grid in pair]


def test_a_tile_and_its_mirror_image_are_computed_once(monkeypatch):
    monkeypatch.setattr(kernels, "_tile", lambda samples, dtype: 16)
    trace = record(monkeypatch)
    x = torch.randn(33, 3)  # three row blocks
    with force_regime("streamed"):
        icsd.similarity_distillation_loss(x.requires_grad_(), torch.randn(33, 3), "kl", backend="triton").backward()
    for kernel in ("streamed_forward_kernel", "streamed_backward_kernel"):
        of_kernel = [access for access in trace.loads if trace.kernels[access[0]] == kernel]
        # Six tiles of two operands, each of 16 samples or of the last one.
        assert trace.bytes(of_kernel, x) == 4 * 3 * (3 * (16 + 16) + 2 * (1 + 16) + (1 + 1))
