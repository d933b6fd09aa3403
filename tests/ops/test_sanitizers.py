"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer: accuracy and hostile arguments again.

The kernels for tile registers (AMX), which few processors have, run there on emulated ones.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from icsd import _native

ROOT = Path(__file__).parents[2]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime(name: str) -> str:
    """The sanitizer's library, to be loaded before Python's own."""
    path = subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return path


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A folder with a copy of the package built under sanitizers, with emulated tile registers."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("icsd", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    flags = f"{SANITIZE} -O1 -g -w -include {folder / 'tests' / 'ops' / 'emulated_amx.h'}"
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"CXXFLAGS": flags, "LDFLAGS": SANITIZE, "ICSD_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]
    return folder


def run(folder, isa, *arguments):
    """Runs Python on the kernels of an instruction set under the sanitizers."""
    environment = {
        "LD_PRELOAD": f"{runtime('libasan.so')}:{runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(folder),
        "ICSD_CPU_ISA": isa,
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def loaded(folder, isa):
    """The native module that such a run imports, and the instruction set it takes."""
    return run(folder, isa, "-c", "import torch, icsd._native as n; print(n.__file__, n.cpu_isa())")


def run_tests(folder, isa, which):
    files = ["tests/ops/test_accuracy.py", "tests/ops/test_native.py", "tests/ops/test_regimes.py"]
    tests = run(folder, isa, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", which, *files)
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-4000:]


@pytest.mark.timeout(900)
def test_native_code_under_sanitizers(sanitized):
    isa = _native.cpu_isa()
    file, used = loaded(sanitized, isa).stdout.split()
    assert (Path(file).parent.parent, used) == (sanitized, isa)
    left_out = ["reference", "dataloader", "forked", "compile", "opcheck", "gradcheck", "memory", "pages"]
    run_tests(sanitized, isa, " and ".join(f"not {name}" for name in left_out))
    fuzz = run(sanitized, isa, "tests/ops/fuzz_native.py", "100", "2")
    assert fuzz.returncode == 0, fuzz.stderr[-4000:]


@pytest.mark.timeout(900)
def test_tile_registers(sanitized):
    found = loaded(sanitized, "amx")
    if "this processor runs" in found.stderr:
        pytest.skip("the kernels for tile registers take AVX-512 with bfloat16 products, too")
    assert found.stdout.split()[1:] == ["amx"]
    run_tests(sanitized, "amx", "bfloat16 and not reference")
