"""The backend is used only where the CUDA runtime in the native module can use the driver and a device."""

import platform
from types import SimpleNamespace

import pytest
import torch

from icsd.ops import cpu, registry
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
    functions = SimpleNamespace(devices=lambda: (0, OLD))
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
