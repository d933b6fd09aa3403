import pytest
import torch

import icsd
from benchmarks.memory import PROCESS, frugal_process, peak_extra_bytes

pytestmark = pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="peak memory is read from Linux's /proc")
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def peak_of():
    """The peak of a call in a process of its own: in this one, memory that other tests freed may serve again."""
    with frugal_process() as executor:
        yield lambda call: executor.submit(peak_extra_bytes, call).result()


def two_tensors():
    torch.zeros(64 * MEBIBYTE, dtype=torch.uint8).add_(1)
    torch.zeros(48 * MEBIBYTE, dtype=torch.uint8).add_(1)


class Gradient:
    """64 MiB, of features that are there before."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(16, MEBIBYTE, requires_grad=True), torch.randn(16, 64)

    def __call__(self) -> None:
        torch.autograd.grad(icsd.similarity_distillation_loss(self.x, self.y, backend="cpu"), self.x)


def nothing():
    pass


def test_the_peak_counts_and_not_the_sum(peak_of):
    assert 60 * MEBIBYTE < peak_of(two_tensors) < 80 * MEBIBYTE


def test_memory_that_icsd_keeps_counts(peak_of):
    assert 64 * MEBIBYTE <= peak_of(Gradient()) < 66 * MEBIBYTE


def test_nothing_counts_as_nothing(peak_of):
    assert peak_of(nothing) < MEBIBYTE
