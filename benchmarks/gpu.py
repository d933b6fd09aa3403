"""Measure the operator on a GPU, with cold caches: `python -m benchmarks.gpu FILE` appends JSON lines to a file.

Each case is measured as eager calls and as the replay of a CUDA graph, with the time of each kernel, beside the replay
of the best composite of PyTorch without a compiler and of its matrix products (cuBLAS) alone. `python -m benchmarks gpu
FILE` shows the tables.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import icsd
from benchmarks import records
from benchmarks.peers import CompositeLoss, combination
from icsd.losses import KL, MSE, Loss
from tools.gpu_device import GPU, open_device

SHAPES = [(16, 8192), (16, 65536), (64, 131072), (128, 65536), (256, 65536), (4096, 512)]
CASES = [
    (*shape, dtype, loss) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for loss in (MSE(), KL())
]
EMULATED_CASES = [(4, 64, torch.float32, KL())]


class GPUComposite(CompositeLoss):
    """The composite with whole Gram matrices: products of parts of a triangle are too small for a GPU."""

    def gram(self, x: Tensor) -> Tensor:
        return self.product(x, x)


def copy_bandwidth(device: GPU) -> float:
    """Return the bytes that a large copy reads and writes per second."""
    source = torch.empty(device.choose(1 << 30, 1 << 20), dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / device.seconds(lambda: target.copy_(source))


def measure(device: GPU, samples: int, dim: int, dtype: torch.dtype, loss: Loss) -> records.Record:
    """Return the times of one case in seconds."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(samples, dim, generator=generator).to(device.device, dtype).requires_grad_(k == 0) for k in range(2)
    )

    def step(value) -> Tensor:
        return torch.autograd.grad(value(student, teacher), student)[0]

    ours = partial(step, partial(icsd.similarity_distillation_loss, loss=loss, backend=device.backend))
    composite = partial(step, GPUComposite(partial(combination, loss=loss)))
    matrix = torch.randn(samples, samples, generator=generator).to(device.device, dtype)

    def products() -> None:
        with torch.no_grad():
            for x in (student, teacher):
                torch.mm(x, x.mT)
            torch.mm(matrix, student)

    return {
        "samples": samples,
        "dim": dim,
        "dtype": str(dtype).removeprefix("torch."),
        "loss": loss.name,
        "eager": device.seconds(ours),
        "graph": device.seconds(device.captured(ours)),
        "composite": device.seconds(device.captured(composite)),
        "cublas": device.seconds(device.captured(products)),
        "moved_bytes": 4 * student.nbytes,  # the student twice, the teacher and the gradient once
        "kernels": device.kernels(ours),
    }


def main(path: str) -> int:
    """Append the results; return 2 if there is no device, 1 if a case failed."""
    device, file = open_device(), Path(path)
    reason = device.unavailable()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    records.append(file, "copy", bytes_per_second=copy_bandwidth(device))
    failed = False
    for case in device.choose(CASES, EMULATED_CASES):
        try:
            records.append(file, "time", **measure(device, *case))
        except RuntimeError as error:
            failed = True
            samples, dim, dtype, loss = case
            name = f"benchmark {samples} x {dim} {dtype} {loss.name}"
            records.append(file, "failure", name=name, detail=str(error).partition("\n")[0])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
