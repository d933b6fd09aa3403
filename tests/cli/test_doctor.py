import subprocess
import sys

import pytest
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
    assert "plain PyTorch, the definition; works here" in out
    assert "problems:" not in out


def test_it_works_without_the_native_module(icsd, monkeypatch):
    monkeypatch.setitem(sys.modules, "icsd._native", None)
    monkeypatch.delattr(package, "_native", raising=False)
    code, out, _ = icsd("doctor")
    assert code == 0
    assert "native          missing" in out


def test_a_backend_forced_by_the_environment_is_reported(icsd, monkeypatch):
    monkeypatch.setenv("ICSD_BACKEND", "reference")
    assert "ICSD_BACKEND=reference" in icsd("doctor")[1]


@pytest.mark.parametrize("isa", ["evil", "AVX2", "avx1024"])
def test_a_wrong_instruction_set_is_reported(program, isa):
    ended = subprocess.run([*program, "doctor"], env={"ICSD_CPU_ISA": isa}, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert f"the backend cpu fails: ICSD_CPU_ISA is '{isa}'" in ended.stdout
    assert f"none is used here: ICSD_CPU_ISA is '{isa}'" in ended.stdout
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("name", "told"),
    [("abacus", "ICSD_BACKEND=abacus is no backend: set one of cpu,"), ("cuda", "ICSD_BACKEND=cuda allows no other")],
)
def test_a_backend_that_cannot_be_used_is_a_problem(icsd, monkeypatch, name, told):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("ICSD_BACKEND", name)
    code, out, _ = icsd("doctor")
    assert code == 1
    assert told in out


def test_a_backend_that_fails_or_is_wrong_is_a_problem(icsd, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    plain = package.similarity_distillation_loss
    monkeypatch.setattr(package, "similarity_distillation_loss", fail)
    code, out, _ = icsd("doctor")
    assert code == 1
    assert "the backend reference fails: no kernel image is available\n" in out
    monkeypatch.setattr(package, "similarity_distillation_loss", lambda *stages: 2 * plain(*stages))
    assert "the backend cpu fails: its gradient of a small batch is wrong" in icsd("doctor")[1]


def test_a_compiler_that_does_not_run_is_reported(icsd, monkeypatch, tmp_path):
    (tmp_path / "nvcc").write_text("not a program")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvcc does not run" in icsd("doctor")[1]
