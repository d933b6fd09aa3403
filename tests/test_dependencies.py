"""The operator and its tests need torch and numpy; everything else is for training and the command line."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HIDDEN = ["jsonargparse", "yaml", "PIL", "tqdm", "safetensors", "tensorboard", "matplotlib", "regex", "triton"]
HIDE = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN!r}))\n"
STEP = """
import torch, icsd
x, y = torch.randn(8, 40, requires_grad=True), torch.randn(8, 30)
loss = icsd.similarity_distillation_loss(x, y, icsd.losses.KL())
loss.backward()
assert x.grad.abs().sum() > 0
"""


def run(script):
    return subprocess.run([sys.executable, "-c", HIDE + script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_operator_needs_only_torch_and_numpy():
    done = run(STEP)
    assert done.returncode == 0, done.stderr


def test_the_tests_of_the_operator_need_no_library_for_training():
    collect = ["--collect-only", "-p", "no:cacheprovider", "-n0", "tests/ops"]
    done = run(f"import pytest; sys.exit(pytest.main({collect!r}))")
    assert done.returncode == 0, done.stdout[-3000:]
