"""Peak rates of this machine, and the least time that the operator needs at these rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median
from time import perf_counter

import torch
from torch.nn import functional as F

from icsd.ops.regimes import feature_flops, sample_flops

COPIED_BYTES = 256 << 20
GEMM_SIZES = (512, 1024, 2048)
SERIAL_ELEMENTS = 32000  # PyTorch uses several threads from 32,768 on
CONTENTION_LIMIT = 3


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine with the current number of threads.

    Attributes:
        copy_bandwidth: The bytes that a copy in memory reads and writes per second.
        gemm_rate: The flops per second of PyTorch's fastest product of square matrices, by dtype.
    """

    copy_bandwidth: float
    gemm_rate: dict[torch.dtype, float]


# The clock of rates. A benchmark by processor time takes that for them, too.
clock = perf_counter


def measure_ceilings(dtypes: Iterable[torch.dtype], seconds: float = 1.0) -> Ceilings:
    """Measure both rates with `torch.get_num_threads()` threads and return the best of all runs.

    Args:
        dtypes: The dtypes of the products.
        seconds: The time for each measurement.
    """
    return Ceilings(_copy_bandwidth(seconds), {dtype: _gemm_rate(dtype, seconds) for dtype in dtypes})


def floor_seconds(
    samples: int,
    student_dim: int,
    teacher_dim: int,
    dtype: torch.dtype,
    loss: str,
    ceilings: Ceilings,
    groups: int = 1,
) -> float:
    """Return the least time of forward + backward with a gradient for the student alone.

    max(bytes / copy bandwidth, flops / GEMM rate), where

    * bytes = itemsize · N · (2 D_s + D_t) read + itemsize · N · D_s written: the student is read in both passes, the
      teacher in the first, and the gradient is written once;
    * flops = N² D_s + N² D_t + 2 N² D_s: two Gram matrices by their symmetric halves and the product that is the
      gradient. For mse, the N D² of the feature regime (`icsd.ops.regimes`) where that is less. Work on N x N matrices
      is not counted.

    Features that stay in a cache between the passes can be read faster than memory allows, so times below the floor are
    possible.

    Args:
        samples: N.
        student_dim: D_s.
        teacher_dim: D_t.
        dtype: The dtype of the features.
        loss: The name of the loss.
        ceilings: The rates of this machine, measured in the same run with the same threads.
        groups: B, by which bytes and flops are multiplied.
    """
    size = samples * dtype.itemsize
    moved = size * (2 * student_dim + teacher_dim) + size * student_dim
    dims = (student_dim, teacher_dim)
    flops = sample_flops(samples, dims)
    if loss == "mse":
        flops = min(flops, feature_flops(samples, dims))
    return groups * max(moved / ceilings.copy_bandwidth, flops / ceilings.gemm_rate[dtype])


def contention() -> float:
    """Return the time of a small parallel region divided by the time of the same work on one thread.

    It is less than 1 on a quiet machine. Where another program runs on one of the cores, every region waits some
    milliseconds for it, and the result is in the hundreds. Above `CONTENTION_LIMIT`, times are of no use.
    """
    return _median_time(4 * SERIAL_ELEMENTS) / (4 * _median_time(SERIAL_ELEMENTS))


def _median_time(elements: int) -> float:
    x = torch.ones(elements)
    times = []
    for _ in range(10):
        start = perf_counter()
        x.add_(1)
        times.append(perf_counter() - start)
    return median(times)


def _copy_bandwidth(seconds: float) -> float:
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    return 2 * COPIED_BYTES / _best_time(partial(target.copy_, source), seconds)


def _gemm_rate(dtype: torch.dtype, seconds: float) -> float:
    """Return the best of torch.mm (MKL in float32) and oneDNN, which differ by a factor of two on some processors."""
    rates = []
    for size in GEMM_SIZES:
        a, b = torch.ones(2, size, size, dtype=dtype)
        products = [partial(torch.mm, a, b, out=torch.empty_like(a))]
        if torch.backends.mkldnn.is_available():
            products.append(partial(F.linear, a.to_mkldnn(), b.to_mkldnn()))
        best = min(_best_time(product, seconds / len(GEMM_SIZES) / len(products)) for product in products)
        rates.append(2 * size**3 / best)
    return max(rates)


def _best_time(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), clock() + seconds
    while clock() < end:
        start = clock()
        call()
        best = min(best, clock() - start)
    return best
