"""The native module against hostile arguments, in a process of its own: a crash of it fails the test."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
SCRIPT = Path(__file__).with_name("fuzz_native.py")


def test_hostile_arguments_never_crash():
    run = subprocess.run([sys.executable, str(SCRIPT), "400", "1"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line.split() for line in run.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["gram", "combine", "distill", "distill_backward"]
    assert all(int(refused) > 20 and int(made) > 20 for _, refused, made in lines), run.stdout
