"""The backend is used only where the CUDA runtime in the native module can use the driver and a device."""

import platform
from types import SimpleNamespace

import pytest
import torch

from icsd.ops import cpu, cuda, registry
from icsd.ops.cuda import CUDABackend

OLD = "the driver is made for CUDA 12.4, this build needs one for CUDA 13.0 or later"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")
def test_devices_need_a_driver_that_is_new_enough(emulated):
    assert emulated.kernels.devices() == (1, "")
    for version, reason in ((12040, OLD), (0, "no CUDA driver is installed"), (13000, "")):
        emulated.library.emulator_driver(version)
        assert emulated.kernels.devices() == (not reason, reason)


@pytest.fixture
def old_driver(monkeypatch):
    """Return the backend of a machine whose driver fits torch's CUDA runtime, but not the module's."""
    functions = SimpleNamespace(devices=lambda: (0, OLD), reads=cpu._native.cpu.reads)
    native = SimpleNamespace(build={"cuda": "80 90"}, cuda=functions, Spec=cpu._native.Spec, LOSSES=cpu._native.LOSSES)
    monkeypatch.setattr(cpu, "_native", native)
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return CUDABackend()


def test_an_old_driver_is_a_reason(old_driver):
    assert old_driver.unavailable() == f"built for sm_80, sm_90, no GPU that it can use here ({OLD})"


def test_another_backend_runs_with_an_old_driver(old_driver):
    old_driver.device_type = "cpu"
    with registry.temporarily(old_driver):
        assert registry.select(None, [torch.ones(3, 2)]).name != "cuda"
        with pytest.raises(RuntimeError, match=r"this build needs one for CUDA 13\.0"):
            registry.select("cuda", [torch.ones(3, 2)])


@pytest.fixture
def device(monkeypatch):
    """Return the backend of a machine with a GPU of sm_87, by a build for sm_90 alone, that takes meta tensors."""
    functions = SimpleNamespace(devices=lambda: (1, ""), reads=cpu._native.cpu.reads)
    native = SimpleNamespace(build={"cuda": "90"}, cuda=functions, Spec=cpu._native.Spec, LOSSES=cpu._native.LOSSES)
    monkeypatch.setattr(cpu, "_native", native)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 7))
    monkeypatch.setattr(CUDABackend, "device_type", "meta")
    with registry.temporarily(CUDABackend()) as backend:
        yield backend


def chosen(name=None):
    return registry.select(name, [torch.ones(3, 2, device="meta")]).name


def test_another_backend_runs_where_the_architecture_was_not_built(device):
    assert chosen() == "composite"
    with pytest.raises(RuntimeError, match="sm_90, the device is sm_87; rebuild with ICSD_CUDA_ARCHITECTURES=87"):
        chosen("cuda")


def test_no_build_is_advised_for_devices_that_are_too_old(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert chosen() == "composite"
    with pytest.raises(RuntimeError, match="the device is sm_70, and the kernels need sm_75 or newer"):
        chosen("cuda")


def test_another_backend_runs_where_a_capture_would_allocate(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert chosen() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen() == "cuda"
    monkeypatch.setattr(cuda, "_uncached", True)
    assert chosen() == "composite"
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured, which cannot hold allocations"):
        chosen("cuda")
