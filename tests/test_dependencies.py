"""The operator and its tests need torch and numpy; everything else is for training and the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HIDDEN = [
    *["jsonargparse", "yaml", "PIL", "tqdm", "safetensors", "tensorboard", "matplotlib", "regex", "triton"],
    *["hypothesis", "pybind11", "ninja", "scipy", "pyarrow", "pytest_timeout", "xdist", "pytest_benchmark"],
]
# The package itself is not hidden, but that it is installed is.
HIDE = f"""
import importlib.metadata, sys
sys.modules.update(dict.fromkeys({HIDDEN!r}))
found = importlib.metadata.version
def version(name):
    if name == "icsd":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
"""
STEP = """
import torch, icsd
x, y = torch.randn(8, 40, requires_grad=True), torch.randn(8, 30)
loss = icsd.similarity_distillation_loss(x, y, icsd.losses.KL())
loss.backward()
assert x.grad.abs().sum() > 0
"""


def run(script, **variables):
    command = [sys.executable, "-c", HIDE + script]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False)


def collecting(*arguments, **variables):
    """Return the process of a pytest without its plugins, which only collects."""
    options = ["--collect-only", "-p", "no:cacheprovider", "-W", "ignore", *arguments]
    script = f"import pytest; sys.exit(pytest.main({options!r}))"
    return run(script, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", **variables)


def collect(*arguments):
    """Return what pytest collects, and its notes."""
    done = collecting(*arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_a_run_of_all_tests_does_not_leave_any_out():
    done = collecting("tests/ops", ICSD_ALL_TESTS="1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "because of missing libraries" in done.stderr


def test_the_operator_needs_only_torch_and_numpy():
    done = run(STEP)
    assert done.returncode == 0, done.stderr


def test_the_tests_of_the_operator_need_no_other_library():
    assert "tests/ops/test_accuracy.py" in collect("tests/ops")


def test_the_tests_of_a_gpu_need_no_other_library():
    found = collect("-m", "gpu", "tests")
    assert "left out: cli, data, evaluation, models," in found
    assert "test_it_never_waits_for_the_device" in found
    assert "test_compute_sanitizer[racecheck]" in found
