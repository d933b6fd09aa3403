"""The regimes on the CPU, the choice between them and the memory that they take."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conformance.regimes import *  # noqa: F403
from conformance.regimes import LOSSES

from icsd import _native
from icsd.ops.regimes import choose_regime, force_regime


def test_every_kernel_is_covered():
    assert {loss.name for loss in LOSSES.values()} == set(_native.LOSSES)


def test_choice():
    def choice(offered, *shape):
        return choose_regime(offered, [torch.empty(shape, device="meta")] * 2)

    everything = ("sample", "feature", "streamed")
    assert choice(everything, 64, 65536) == "sample"
    assert choice(everything, 1_000_000, 128) == "feature"
    assert choice(("sample", "streamed"), 65536, 256) == "streamed"
    assert choice(("sample", "streamed"), 1024, 256) == "sample"
    assert choice(("sample", "streamed"), 100, 1024, 256) == "streamed"
    assert choice(("sample",), 65536, 256) == "sample"
    with force_regime("streamed"):
        assert choice(everything, 4, 8) == "streamed"
        assert choice(("sample",), 4, 8) == "sample"


MEASURE = """
import sys
from pathlib import Path
import torch
import icsd
from icsd.ops.regimes import force_regime
n, width, case = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
x, y = torch.randn(2, n, width)
x.requires_grad_()
def step(n):
    icsd.similarity_distillation_loss(x[:n], y[:n], case, backend="cpu").backward()
def bytes_of(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10
step(64)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a process inherits that of its parent
before = bytes_of("VmRSS:")
step(n)
print(bytes_of("VmHWM:") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc, which other systems lack")
@pytest.mark.parametrize(("n", "width", "case"), [(200_000, 32, "mse"), (12_000, 16, "kl"), (12_000, 16, "dist")])
def test_memory(n, width, case):
    """Far below one N x N matrix: a few copies of the features and what a square of blocks takes."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n), str(width), case],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout) < 6 * n * max(width, 48) * 4 + (64 << 20) < n * n * 4
