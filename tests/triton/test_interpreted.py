"""The tests of interpreted.py, in a process of their own: the interpreter is switched on when kernels are defined."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def interpreted(*arguments: str) -> str:
    """Run pytest with interpreted kernels."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-W", "ignore", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.timeout(600)
def test_interpreted():
    assert "passed" in interpreted("tests/triton/interpreted.py")
