"""All tests here are marked `gpu` and skipped, with the reason, where the CUDA backend does not run."""

from pathlib import Path

import pytest
from conformance import Limits
from offload import Offloading

from icsd.ops import registry
from icsd.ops.cuda import CUDABackend
from icsd.ops.triton import TritonBackend


def pytest_collection_modifyitems(items):
    reason = CUDABackend().unavailable()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cuda", "triton", "triton-autotuned"])
def backend(request, monkeypatch):
    """The name of the backend under test, which copies to the GPU."""
    if request.param == "triton-autotuned":
        monkeypatch.setenv("ICSD_TRITON_AUTOTUNE", "1")
    chosen = CUDABackend() if request.param == "cuda" else TritonBackend()
    reason = chosen.unavailable()
    if reason is not None:
        pytest.skip(reason)
    with registry.temporarily(Offloading(chosen)) as offloading:
        yield offloading.name


@pytest.fixture
def fused_backend(backend):
    """The name of the backend under test, which has kernels."""
    return backend


@pytest.fixture
def limits():
    """The largest inputs."""
    return Limits()
