"""The CUDA kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, in the emulator."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from harness import COMPILER, ROOT, SANITIZER_OPTIONS, build_native, run

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")

KERNELS, ACCURACY, BANKS = (
    Path(__file__).with_name(name)
    for name in ("test_kernels.py", "test_emulated_accuracy.py", "test_emulated_banks.py")
)


def sanitizer(mode: str) -> str:
    """The libraries to be loaded before Python's own."""
    names = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[mode]
    paths = [run([COMPILER, f"-print-file-name={name}"]).strip() for name in names]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip(f"the compiler has no {' or '.join(names)}")
    return ":".join(paths)


# Races are looked for within a block, then between blocks. Memory is accessed alike for bfloat16 and float16.
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("mode", "blocks", "which", "tests"),
    [
        (
            "address",
            "sequential",
            "every_kernel or layouts and not bfloat16 or degenerate or gaps",
            [KERNELS, f"{ACCURACY}::test_degenerate_shapes", BANKS],
        ),
        ("thread", "sequential,concurrent", "every_kernel", [KERNELS, BANKS]),
    ],
    ids=["stray accesses", "races"],
)
def test_kernels(mode, blocks, which, tests):
    build_native(mode)  # the compiler runs without the sanitizer in its way
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-k", which, *tests],
        cwd=ROOT,
        env=os.environ
        | SANITIZER_OPTIONS
        | {"LD_PRELOAD": sanitizer(mode), "ICSD_EMULATOR_MODE": mode, "ICSD_EMULATOR_BLOCKS": blocks},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
