"""Measure the operator on a CUDA device, with cold caches, beside PyTorch and the floor: `python -m benchmarks.gpu`.

It is not part of the suite.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

import icsd
from benchmarks.peers import plain_loss
from icsd.losses import KL, MSE
from icsd.ops.cuda import CUDABackend

SHAPES = [(16, 1024), (16, 65536), (32, 131072), (64, 65536), (64, 524288), (128, 32768), (128, 262144), (256, 65536)]
REPEATS = 30
FLUSHED_BYTES = 512 << 20  # more than any device's L2 cache


def median_ms(call: Callable[[], object]) -> float:
    """Return the median time of `call` with cold caches; the device is kept busy while the host enqueues the call."""
    flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def bytes_per_ms() -> float:
    """Return the bandwidth of a copy of 1 GiB, reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source))


def main() -> int:
    """Print the table; return 2 if the backend cannot run."""
    reason = CUDABackend().unavailable()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    bandwidth = bytes_per_ms()
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e6:.0f} GB/s\n")
    print("| N x D | dtype | loss | icsd ms | / floor | plain | compile |\n|---|---|---|---|---|---|---|")
    for n, d in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            student = torch.randn(n, d, device="cuda", dtype=dtype, requires_grad=True)
            teacher = torch.randn(n, d, device="cuda", dtype=dtype)
            floor = 4 * student.nbytes / bandwidth  # X twice, Y and dX once
            for loss in (MSE(), KL()):
                losses = {
                    "icsd": lambda x, y, loss=loss: icsd.similarity_distillation_loss(x, y, loss),
                    "plain": lambda x, y, loss=loss: plain_loss(x, y, loss),
                }
                losses["compile"] = torch.compile(losses["plain"])
                times = {
                    name: median_ms(lambda value=value, x=student, y=teacher: torch.autograd.grad(value(x, y), x))
                    for name, value in losses.items()
                }
                ours, others = times["icsd"], [f"{times[name] / times['icsd']:.2f}x" for name in ("plain", "compile")]
                cells = [f"{n} x {d:,}", str(dtype)[6:], loss.name, f"{ours:.3f}", f"{ours / floor:.2f}", *others]
                print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
