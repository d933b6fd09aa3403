"""What this machine can do at all, and how long the operator must therefore take."""

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
SERIAL_ELEMENTS = 32000  # just under what PyTorch shares among threads
CONTENTION_LIMIT = 3


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of this machine on the current number of threads.

    Attributes:
        copy_bandwidth: Bytes read plus bytes written per second by a copy in memory.
        gemm_rate: Flops per second of PyTorch's fastest product of a few square matrices, by dtype.
    """

    copy_bandwidth: float
    gemm_rate: dict[torch.dtype, float]


def measure_ceilings(dtypes: Iterable[torch.dtype], seconds: float = 1.0) -> Ceilings:
    """Measures both on `torch.get_num_threads()` threads; the best run counts, as a ceiling is never passed.

    Args:
        dtypes: Of the products.
        seconds: Time for each measurement.
    """
    return Ceilings(_copy_bandwidth(seconds), {dtype: _gemm_rate(dtype, seconds) for dtype in dtypes})


def floor_seconds(
    samples: int, student_features: int, teacher_features: int, dtype: torch.dtype, loss: str, ceilings: Ceilings
) -> float:
    """The least time of forward + backward, with a gradient for the student alone.

    max(bytes / copy bandwidth, flops / GEMM rate), where

    * bytes = itemsize · N · (2 D_s + D_t) read + itemsize · N · D_s written: the student is read in both passes, the
      teacher in the first, and the gradient is written once;
    * flops = N² D_s + N² D_t + 2 N² D_s: two Gram matrices by their symmetric halves and the product that is the
      gradient. For mse, the N D² of feature space (`icsd.ops.regimes`) where that is less. Work on N x N matrices is
      left out, whatever the loss.

    Features that stay in a cache between the passes can beat the bandwidth of memory, hence the floor.

    Args:
        samples: N.
        student_features: D_s.
        teacher_features: D_t.
        dtype: Of the features.
        loss: Name of the loss.
        ceilings: Of this machine, measured in the same run on the same threads.
    """
    size = samples * dtype.itemsize
    moved = size * (2 * student_features + teacher_features) + size * student_features
    widths = (student_features, teacher_features)
    flops = sample_flops(samples, widths)
    if loss == "mse":
        flops = min(flops, feature_flops(samples, widths))
    return max(moved / ceilings.copy_bandwidth, flops / ceilings.gemm_rate[dtype])


def contention() -> float:
    """How long a small parallel region takes, relative to the same work without threads.

    Under 1 on a quiet machine. Where another program holds one of the cores, each region waits for it to yield, some
    milliseconds long: hundreds. Above `CONTENTION_LIMIT`, times say more about the neighbors than about the code.
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
    """The best of torch.mm (MKL in float32) and oneDNN, which differ by a factor of two on some processors."""
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
    best, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end:
        start = perf_counter()
        call()
        best = min(best, perf_counter() - start)
    return best
