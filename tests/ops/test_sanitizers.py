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
# AddressSanitizer itself finds uses of null pointers.
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=null,vptr,object-size -fno-sanitize-recover=all"

# The kernels run too slowly without optimization, and the code around them compiles too slowly with it.
COMPILER = """#!/bin/sh
case "$*" in
  *ICSD_ISA*) exec c++ "$@" -O1 ;;
  *) exec c++ "$@" -O0 ;;
esac
"""


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
    isas = " ".join({_native.cpu_isa(), "amx"} & set(_native.build["cpu"].split()))  # amx is for x86 alone
    for name in ("icsd", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    flags = f"{SANITIZE} -g1 -w -include {folder / 'tests' / 'ops' / 'emulated_amx.h'}"
    compiler = folder / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ
        | {"CXX": str(compiler), "CXXFLAGS": flags, "LDFLAGS": SANITIZE, "ICSD_CUDA": "0", "ICSD_CPU_ISAS": isas},
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


# These show nothing of their own here: plain PyTorch, derivatives of derivatives, bits, measurements and other
# processes. The passes over many samples are the same for all types, except that float64 has kernels of its own.
LEFT_OUT = [
    *["reference", "compile", "opcheck", "gradcheck", "same_bits", "threads_agree", "depend_on_threads", "memory"],
    *["pages", "copies_no_features", "dataloader", "forked", "test_losses", "(does_not_cancel and 0.0)"],
    *["(1400 and not torch.float32)", "(600 and torch.float16)"],
]


def run_tests(folder, isa, *which):
    files = ["tests/ops/test_accuracy.py", "tests/ops/test_native.py", "tests/ops/test_regimes.py"]
    which = " and ".join([*which, *(f"not {names}" for names in LEFT_OUT)])
    tests = run(folder, isa, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", which, *files)
    assert tests.returncode == 0, tests.stdout[-4000:] + tests.stderr[-4000:]


@pytest.mark.timeout(900)
def test_native_code_under_sanitizers(sanitized):
    isa = _native.cpu_isa()
    file, used = loaded(sanitized, isa).stdout.split()
    assert (Path(file).parent.parent, used) == (sanitized, isa)
    run_tests(sanitized, isa)
    fuzz = run(sanitized, isa, "tests/ops/fuzz_native.py", "100", "2")
    assert fuzz.returncode == 0, fuzz.stderr[-4000:]


@pytest.mark.timeout(900)
def test_tile_registers(sanitized):
    found = loaded(sanitized, "amx")
    if "this processor runs" in found.stderr:
        pytest.skip("the kernels for tile registers take AVX-512 with bfloat16 products, too")
    assert found.stdout.split()[1:] == ["amx"]
    run_tests(sanitized, "amx", "bfloat16")
