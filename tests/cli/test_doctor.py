import sys

import torch

import icsd as package


def test_the_report_names_versions_builds_and_backends(icsd):
    code, out, _ = icsd("doctor")
    assert code == 0
    assert package.__version__ in out
    assert torch.__version__ in out
    for backend in package.backends():
        assert f"\n  {backend.name} " in out
        assert backend.available or backend.reason in out


def test_it_works_without_the_native_module(icsd, monkeypatch):
    monkeypatch.setitem(sys.modules, "icsd._native", None)
    monkeypatch.delattr(package, "_native", raising=False)
    code, out, _ = icsd("doctor")
    assert code == 0
    assert "native        missing" in out


def test_a_backend_forced_by_the_environment_is_told(icsd, monkeypatch):
    monkeypatch.setenv("ICSD_BACKEND", "reference")
    assert "ICSD_BACKEND=reference" in icsd("doctor")[1]
