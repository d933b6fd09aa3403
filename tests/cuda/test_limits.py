"""Launches stay within the limits of the device, for every number of samples that a regime takes."""

import platform

import pytest
import torch
from inputs import normal

import icsd
from icsd.ops.regimes import force_regime

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")

EVERY_ARCHITECTURE = [
    "test_the_largest_matrices_can_be_launched",
    "test_every_kernel_can_be_launched",
    "test_limits_are_set_once_per_kernel",
    "test_norms_that_shared_memory_is_too_small_for",
]


@pytest.fixture
def dry(emulated):
    """Launches are checked, but nothing runs."""
    emulated.library.emulator_dry_run(True)
    yield emulated
    emulated.library.emulator_dry_run(False)


def run(*stages, loss="kl", regime="sample", backend="emulated"):
    stages = [stage.detach().requires_grad_() for stage in stages]
    with force_regime(regime):
        loss = icsd.interstage_distillation_loss(stages, loss, detach_teacher=False, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, stages)


# The largest matrices that the regime takes, and sizes at which shared memory first exceeds a limit of some device.
@pytest.mark.parametrize(
    ("samples", "dtype"),
    [(5121, torch.float32), (5792, torch.float32), (5792, torch.bfloat16)]
    + [(samples, torch.float64) for samples in (2049, 3072, 3073, 4095)],
    ids=str,
)
def test_the_largest_matrices_can_be_launched(samples, dtype, dry):
    before = dry.library.emulator_launches()
    run(torch.zeros(samples, 2, dtype=dtype), torch.zeros(samples, 3, dtype=dtype))
    assert dry.library.emulator_launches() >= before + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 16, 64, 128, 300])
def test_every_kernel_can_be_launched(samples, dtype, dry):
    stages = [torch.zeros(3, samples, dim, dtype=dtype) for dim in (1000, 700, 40)]
    for regime in ("sample", "streamed", "feature"):
        run(*stages, loss="mse", regime=regime)


def test_limits_are_set_once_per_kernel(emulated):
    stages = normal(20, 30), normal(20, 40)
    for regime in ("sample", "streamed", "feature"):
        run(*stages, loss="mse", regime=regime)
        before = emulated.library.emulator_attributes_set()
        run(*stages, loss="mse", regime=regime)
        assert emulated.library.emulator_attributes_set() == before


def test_norms_that_shared_memory_is_too_small_for(emulated):
    """The inverse norms of 3,100 samples in float64 fit in no block's shared memory on sm_75."""
    if emulated.architecture != 75:
        pytest.skip("they fit on this device")
    x, y = normal(2, 3100, 2, dtype=torch.float64), normal(2, 3100, 1, seed=1, dtype=torch.float64)
    similarities = [z @ z.mT / (z.norm(dim=2)[:, None] * z.norm(dim=2)[..., None]) for z in (x, y)]
    with force_regime("sample"):
        losses = icsd.similarity_distillation_loss(x, y, reduction="none", backend="emulated")
    expected = (similarities[0] - similarities[1]).square().mean((1, 2))
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
