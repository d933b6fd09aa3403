"""Behavior that only a device shows: streams, graphs, devices, synchronization, 64-bit addresses, launches."""

import pytest
import torch

import icsd
from icsd import _native
from icsd.ops.regimes import force_regime

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def stages_of(*widths, n=24, dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    stages = [torch.randn(n, d, generator=generator) + 0.3 for d in widths]
    return [stage.to(device, dtype).requires_grad_() for stage in stages]


def loss_and_gradients(stages, loss="kl", backend="cuda", **options):
    value = icsd.interstage_distillation_loss(stages, loss, backend=backend, **options)
    inputs = stages if options.get("detach_teacher") is False else stages[:-1]
    return value.detach(), *torch.autograd.grad(value, inputs)


def test_it_is_the_backend_of_cuda_tensors():
    stages = stages_of(100, 50)
    before = _native.cuda.launches()
    loss = icsd.interstage_distillation_loss(stages)
    assert _native.cuda.launches() > before
    assert loss.device == stages[0].device


def bound(dtype, expected):
    """Return how far a result may be from one in float64, which may be 0."""
    relative, absolute = {torch.float32: (1e-3, 1e-6), torch.float64: (1e-9, 1e-12)}.get(dtype, (0.05, 1e-6))
    return relative * expected.norm() + absolute


@pytest.mark.parametrize("regime", ["sample", "feature", "streamed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(dtype, regime):
    """Small, for compute-sanitizer: all losses with kernels, all gradients."""
    for n, d in ((3, 2), (17, 50), (35, 70), (150, 40)):
        stages = stages_of(d, d + 3, d, n=n, dtype=dtype)
        for loss in ("mse", "kl", "smooth_l1", "sp", "cc", "pkt", "dist"):
            with force_regime(regime):
                ours = loss_and_gradients(stages, loss, detach_teacher=False)
            truth = loss_and_gradients([stage.double() for stage in stages], loss, "reference", detach_teacher=False)
            for a, b in zip(ours, truth, strict=True):
                assert (a - b).norm() <= bound(dtype, b), (n, loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_of_banks(dtype):
    """Small, for compute-sanitizer: all losses with kernels, all gradients, some of two splits."""

    def loss_and_gradients_to_banks(features, loss, backend):
        leaves = [x.detach().requires_grad_() for x in features]
        banks = {"student_bank": leaves[2], "teacher_bank": leaves[3]}
        value = icsd.similarity_distillation_loss(*leaves[:2], loss, **banks, detach_teacher=False, backend=backend)
        return value.detach(), *torch.autograd.grad(value, leaves)

    for n, m in ((3, 140), (70, 1100)):
        queries, banks = (stages_of(34, 50, n=count, dtype=dtype) for count in (n, m))
        for loss in ("mse", "kl", "smooth_l1"):
            ours = loss_and_gradients_to_banks([*queries, *banks], loss, "cuda")
            truth = loss_and_gradients_to_banks([x.double() for x in (*queries, *banks)], loss, "reference")
            for a, b in zip(ours, truth, strict=True):
                assert (a - b).norm() <= bound(dtype, b), (n, loss)


def test_four_launches_for_all_stages():
    stages = stages_of(64, 256, 1024, 100)
    before = _native.cuda.launches()
    loss_and_gradients(stages, detach_teacher=False)
    assert _native.cuda.launches() - before <= 4


def test_it_never_waits_for_the_device():
    stages = stages_of(300, 200)
    loss_and_gradients(stages)  # whatever is initialized once
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(stages)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_it_runs_on_the_current_stream():
    expected = loss_and_gradients(stages_of(5000, 3000))
    stages = [torch.zeros_like(stage) for stage in stages_of(5000, 3000)]
    values = [stage.detach() for stage in stages_of(5000, 3000)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever does not wait for this stream reads zeros
        for stage, value in zip(stages, values, strict=True):
            stage.copy_(value)
        results = loss_and_gradients([stage.requires_grad_() for stage in stages])
    stream.synchronize()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("regime", "loss"), [("sample", "kl"), ("feature", "mse"), ("streamed", "kl")])
def test_cuda_graph(regime, loss):
    static = stages_of(700, 300)
    with force_regime(regime):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss_and_gradients(static, loss)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = loss_and_gradients(static, loss)
        for _ in range(3):
            with torch.no_grad():
                for stage in static:
                    stage.copy_(torch.randn_like(stage))
            graph.replay()
            torch.testing.assert_close(captured, loss_and_gradients(static, loss), rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_tensors_of_another_device_than_the_current_one():
    expected = loss_and_gradients(stages_of(700, 300))
    with torch.cuda.device(0):
        results = loss_and_gradients(stages_of(700, 300, device="cuda:1"))
    assert {result.device.index for result in results} == {1}
    torch.testing.assert_close([r.cpu() for r in results], [e.cpu() for e in expected], rtol=0, atol=0)


def test_deterministic():
    stages = stages_of(5000, 3000)
    first = loss_and_gradients(stages, detach_teacher=False)
    for _ in range(5):
        torch.testing.assert_close(loss_and_gradients(stages, detach_teacher=False), first, rtol=0, atol=0)


def test_elements_beyond_32_bits():
    stride = 2**29 + 16
    if torch.cuda.mem_get_info()[0] < 6 * 2 * stride + 2**30:
        pytest.skip("less than 7 GB of device memory are free")
    memory = torch.empty(5 * stride, dtype=torch.bfloat16, device="cuda")
    far = memory.as_strided((5, 100), (stride, 1))
    far.copy_(stages_of(100, n=5)[0].detach())
    near = far.clone()
    teacher = stages_of(70, n=5)[0].detach()
    results = [loss_and_gradients([x.requires_grad_(), teacher]) for x in (far, near)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def step(coarse, fine):
        return icsd.interstage_distillation_loss([coarse * 2, fine], "kl", backend="cuda")

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    coarse, fine = stages_of(130, 70)
    expected, got = (torch.autograd.grad(call(coarse, fine), coarse)[0] for call in (step, compiled))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_autocast_keeps_wide_accumulation():
    x = stages_of(4000, dtype=torch.bfloat16)[0]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        similarity = icsd.cross_sample_similarity(x, backend="cuda")
    assert similarity.dtype == torch.float32
    truth = icsd.cross_sample_similarity(x.double(), backend="reference").float()
    torch.testing.assert_close(similarity, truth, rtol=1e-5, atol=1e-6)
