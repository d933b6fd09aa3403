"""The tests of the operator, run with the Triton kernels on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU with a driver is found"),
]
HERE = Path(__file__).parent


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("autotune", ["0", "1"])
@pytest.mark.parametrize("module", ["test_accuracy.py", "test_autograd.py"])
def test_suite(module, autotune):
    environment = {"ICSD_TEST_BACKENDS": "triton", "ICSD_TRITON_AUTOTUNE": autotune}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.with_name("gpu")), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "offload", f"tests/ops/{module}", "-k", "triton or penalty"],
        cwd=HERE.parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


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
