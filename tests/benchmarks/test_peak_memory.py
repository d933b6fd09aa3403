import pytest
import torch

import icsd
from benchmarks.memory import PROCESS, peak_extra_bytes

pytestmark = pytest.mark.skipif(not (PROCESS / "clear_refs").exists(), reason="peak memory is read from Linux's /proc")
MEBIBYTE = 1 << 20


def test_the_peak_counts_and_not_the_sum():
    def call():
        torch.zeros(64 * MEBIBYTE, dtype=torch.uint8).add_(1)
        torch.zeros(48 * MEBIBYTE, dtype=torch.uint8).add_(1)

    assert 60 * MEBIBYTE < peak_extra_bytes(call) < 80 * MEBIBYTE


def test_memory_that_icsd_keeps_counts():
    x, y = torch.randn(16, MEBIBYTE, requires_grad=True), torch.randn(16, 64)

    def call():
        return torch.autograd.grad(icsd.similarity_distillation_loss(x, y, backend="cpu"), x)

    assert 64 * MEBIBYTE <= peak_extra_bytes(call) < 66 * MEBIBYTE


def test_nothing_counts_as_nothing():
    assert peak_extra_bytes(lambda: None) < MEBIBYTE
