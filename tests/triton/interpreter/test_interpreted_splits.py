"""Few row blocks on a large device: the columns of N x N matrices are split, and the summaries of the splits merged."""

import pytest
import torch

pytest.importorskip("triton")

from accesses import record

import icsd
from icsd.losses import KL, SmoothL1
from icsd.ops.contract import Spec
from icsd.ops.regimes import force_regime
from icsd.ops.triton import runtime
from icsd.ops.triton.kernels import streamed
from icsd.ops.triton.kernels.features import Features


@pytest.mark.parametrize("loss", [KL(0.05, 0.3, include_diagonal=False), SmoothL1(0.2)], ids=repr)
def test_summaries_of_splits_are_merged(loss, monkeypatch):
    monkeypatch.setattr(streamed, "FEWEST_TILES", 1)
    # Two groups of two row blocks: two splits of one tile each, the second one with a single column.
    monkeypatch.setattr(runtime, "processors", lambda device: 4)
    trace = record(monkeypatch)
    stages = [torch.randn(2, 65, dim).mul_(torch.rand(2, 65, 1) + 0.1) for dim in (20, 5, 13)]
    results = []
    for backend, regime in (("triton", "streamed"), ("reference", "sample")):
        leaves = [stage.clone().requires_grad_() for stage in stages]
        with force_regime(regime):
            value = icsd.interstage_distillation_loss(
                leaves, loss, weights=[0.3, 1.7], reduction="none", detach_teacher=False, backend=backend
            )
        results.append((value.detach(), *torch.autograd.grad(value, leaves, torch.tensor([1.0, -2.0]))))
    assert trace.kernels.count("merge_splits_kernel") == 2  # one for each student
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


@pytest.mark.parametrize(("samples", "processors", "splits"), [(512, 132, 1), (4096, 132, 4), (20000, 132, 1)])
def test_programs_fill_the_device(samples, processors, splits, monkeypatch):
    monkeypatch.setattr(runtime, "processors", lambda device: processors)
    grids = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, out, grid, *_, **__: grids.append(grid))
    features = Features.of(torch.empty(1, samples, 8), torch.empty(1, samples))
    spec = Spec("kl", (0.1, 0.1, 1.0), (1.0,), 1e-8, False, "streamed")
    streamed.streamed_forward(features, features, torch.empty(1, samples), None, 1.0, spec)
    assert grids[0] == (-(-samples // 64), splits)
    assert len(grids) == 1 + (splits > 1)
