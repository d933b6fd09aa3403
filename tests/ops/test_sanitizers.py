"""The native code under AddressSanitizer and UndefinedBehaviorSanitizer: accuracy and hostile arguments again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.timeout(600)
def test_native_code_under_sanitizers(tmp_path):
    preload = f"{runtime('libasan.so')}:{runtime('libubsan.so')}"
    for name in ("icsd", "csrc", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CXXFLAGS": f"{SANITIZE} -O1 -g -w", "LDFLAGS": SANITIZE, "ICSD_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stdout[-2000:] + build.stderr[-2000:]
    files = ["tests/ops/test_accuracy.py", "tests/ops/test_native.py", "tests/ops/test_regimes.py"]
    left_out = ["reference", "dataloader", "forked", "compile", "opcheck", "gradcheck", "memory"]
    which = " and ".join(f"not {name}" for name in left_out)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", which, *files],
        cwd=tmp_path,
        env=os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert f"{tmp_path}" in loaded_from(tmp_path, preload)


def loaded_from(folder: Path, preload: str) -> str:
    """Which native module such a run imports: the sanitized one."""
    return subprocess.run(
        [sys.executable, "-c", "import torch, icsd._native as n; print(n.__file__)"],
        cwd=folder,
        env=os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
