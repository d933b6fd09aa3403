"""The tests of the operator, run with the Triton kernels in Triton's interpreter.

They run in processes of their own, because the interpreter is chosen when kernels are defined.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


ACCURACY = """groups or degenerate or zero_rows or overflow or mixed or huge or similarity
    or (nan and float32 and not 530) or (losses and (float32 or bfloat16)) or (layouts and bfloat16)"""
AUTOGRAD = """opcheck or penalty
    or (triton and (similarity or clamped or one_tensor or autocast or deterministic or (fullgraph and False)))"""


def interpreted(*arguments: str) -> str:
    """Run pytest with interpreted kernels, on small matrices because the interpreter is slow."""
    limits = {"ICSD_TEST_MOST_SAMPLES": "40", "ICSD_TEST_MOST_GROUPS": "8"}
    environment = {"TRITON_INTERPRET": "1", "ICSD_TEST_BACKENDS": "triton", **limits}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-W", "ignore", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("module", "which"),
    [
        ("ops/test_accuracy.py", ACCURACY),
        ("ops/test_autograd.py", AUTOGRAD),
        ("triton/interpreted.py", ""),
    ],
)
def test_interpreted(module, which):
    assert "passed" in interpreted(f"tests/{module}", "-k", " ".join(which.split()))
