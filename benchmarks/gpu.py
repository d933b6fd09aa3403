"""Measure the operator on a GPU, with cold caches: `python -m benchmarks.gpu FILE` appends JSON lines to a file.

Each case is measured as eager calls and as the replay of a CUDA graph, with the time of each kernel, beside the replay
of the best composite of PyTorch and of its matrix products (cuBLAS) alone. The composite whose work on N x N matrices
is compiled comes after all that, since compilers take long. `python -m benchmarks gpu FILE` shows the tables.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import icsd
from benchmarks import records
from benchmarks.peers import Implementation, WholeCompositeLoss, combination
from icsd.losses import KL, MSE, Loss
from tools.gpu_device import GPU, open_device

SHAPES = [(16, 8192), (16, 65536), (64, 131072), (128, 65536), (256, 65536), (4096, 512)]
CASES = [
    (*shape, dtype, loss) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16) for loss in (MSE(), KL())
]
EMULATED_CASES = [(4, 64, torch.float32, KL())]


def copy_bandwidth(device: GPU) -> float:
    """Return the bytes that a large copy reads and writes per second."""
    source = torch.empty(device.choose(1 << 30, 1 << 20), dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / device.seconds(lambda: target.copy_(source))


def features(device: GPU, samples: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a student, which gets a gradient, and a teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(samples, dim, generator=generator).to(device.device, dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def step(loss: Implementation, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the student's gradient."""
    return torch.autograd.grad(loss(student, teacher), student)[0]


def columns(samples: int, dim: int, dtype: torch.dtype, loss: Loss) -> records.Record:
    """Return the columns that tell a case."""
    return {"samples": samples, "dim": dim, "dtype": str(dtype).removeprefix("torch."), "loss": loss.name}


def measure(device: GPU, samples: int, dim: int, dtype: torch.dtype, loss: Loss) -> records.Record:
    """Return the times of one case in seconds."""
    student, teacher = features(device, samples, dim, dtype)
    # Products of parts of a triangle are too small for a GPU.
    composite = partial(step, WholeCompositeLoss(partial(combination, loss=loss)), student, teacher)
    operator = partial(icsd.similarity_distillation_loss, loss=loss, backend=device.backend)
    ours = partial(step, operator, student, teacher)
    matrix = torch.randn(samples, samples).to(device.device, dtype)

    def products() -> None:
        with torch.no_grad():
            for x in (student, teacher):
                torch.mm(x, x.mT)
            torch.mm(matrix, student)

    return {
        **columns(samples, dim, dtype, loss),
        "eager": device.seconds(ours),
        "graph": device.seconds(device.captured(ours)),
        "composite": device.seconds(device.captured(composite)),
        "cublas": device.seconds(device.captured(products)),
        "moved_bytes": 4 * student.nbytes,  # the student twice, the teacher and the gradient once
        "kernels": device.kernels(ours),
    }


def measure_compiled(device: GPU, samples: int, dim: int, dtype: torch.dtype, loss: Loss) -> records.Record:
    """Return the time of the compiled composite in seconds."""
    torch.compiler.reset()  # otherwise the compiler gives up after some shapes
    backend = device.choose("inductor", "eager")
    compiled = torch.compile(partial(combination, loss=loss), dynamic=False, backend=backend)
    call = partial(step, WholeCompositeLoss(compiled), *features(device, samples, dim, dtype))
    return {**columns(samples, dim, dtype, loss), "seconds": device.seconds(device.captured(call))}


def append(file: Path, kind: str, measured: Callable[[], records.Record], name: str) -> bool:
    """Append a record of a measurement, or of its failure; return whether it succeeded."""
    try:
        records.append(file, kind, **measured())
    except RuntimeError as error:
        records.append(file, "failure", name=name, detail=str(error).partition("\n")[0])
        return False
    return True


def main(path: str) -> int:
    """Append the results; return 2 if there is no device, 1 if a case failed."""
    device, file = open_device(), Path(path)
    reason = device.unavailable()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    records.append(file, "copy", bytes_per_second=copy_bandwidth(device))
    passed = [
        append(file, kind, partial(measured, device, *case), " ".join([kind, *map(str, columns(*case).values())]))
        for kind, measured in (("time", measure), ("compiled", measure_compiled))
        for case in device.choose(CASES, EMULATED_CASES)
    ]
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
