"""The Triton kernels on a real GPU: streams, waiting and compiled graphs. tests/gpu runs the tests of all backends."""

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU with a driver is found"),
]


def test_it_never_waits_for_the_device_and_runs_on_its_stream():
    import icsd

    stages = [torch.randn(24, d, device="cuda", requires_grad=True) for d in (300, 200)]

    def run():
        loss = icsd.interstage_distillation_loss(stages, "kl", backend="triton")
        return torch.autograd.grad(loss, stages[0])[0]

    expected = run()  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.parametrize("autotune", ["0", "1"])
@pytest.mark.parametrize("loss", ["mse", "kl", "smooth_l1"])
def test_compiled_graphs_compute_what_the_kernels_do(loss, autotune, monkeypatch):
    import icsd

    monkeypatch.setenv("ICSD_TRITON_AUTOTUNE", autotune)
    stages = [torch.randn(2, 24, d, device="cuda", requires_grad=True) for d in (3000, 200, 500)]

    def output(*stages):
        options = {"detach_teacher": False, "reduction": "sum", "backend": "triton"}
        return icsd.interstage_distillation_loss([x * 2 for x in stages], loss, **options)

    results = []
    for call in (output, torch.compile(output, fullgraph=True, dynamic=False)):
        value = call(*stages)
        results.append((value, *torch.autograd.grad(value, stages)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "dim"), [("mse", 100), ("kl", 250), ("smooth_l1", 500)])
def test_banks(loss, dim, dtype):
    import icsd

    shapes = [(200, dim), (200, 64), (5000, dim), (5000, 64)]
    given = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]

    def run(leaves, backend):
        student, teacher, *banks = [x.detach().requires_grad_() for x in leaves]
        options = {"student_bank": banks[0], "teacher_bank": banks[1], "detach_teacher": False, "backend": backend}
        value = icsd.similarity_distillation_loss(student, teacher, loss, **options)
        return value.detach(), torch.autograd.grad(value, [student, teacher, *banks])

    value, gradients = run(given, "triton")
    again, same = run(given, "triton")
    torch.testing.assert_close((again, same), (value, gradients), rtol=0, atol=0)
    exact, truth = run([x.double() for x in given], "reference")
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    for got, want in zip(gradients, truth, strict=True):
        assert torch.dist(got.double(), want) < max(1e-5, torch.finfo(dtype).eps) * want.norm()
