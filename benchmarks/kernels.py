"""Compiles the Triton kernels for every architecture, without a GPU, and tells what the machine code needs.

`python -m benchmarks.kernels` prints the table of docs/triton.md; `--pin FILE` writes what tests/triton compares.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import Autotuner, driver

from icsd.ops.fused import Distillation, saved_dtype, saved_shape
from icsd.ops.triton import feature_space, kernels, launch, sample_space, streamed

NVIDIA = [80, 86, 89, 90, 100, 120]
AMD = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32}
TARGETS = [GPUTarget("cuda", capability, 32) for capability in NVIDIA] + [
    GPUTarget("hip", name, width) for name, width in AMD.items()
]

# Of a multiprocessor: warps, blocks, KiB of shared memory (CUDA C++ Programming Guide, "Compute capabilities").
MULTIPROCESSORS = {
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}
MATRIX_INSTRUCTION = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma_f\d+|v_wmma_f\d+)")
TEMPERATURES = [0.1, 0.1, 1.0]  # and whether the diagonal takes part


class Resources(NamedTuple):
    """What a kernel needs on an architecture.

    Attributes:
        registers: 32-bit registers of a thread.
        stack: Bytes of a thread's stack: 0 if nothing is spilled.
        shared: Bytes of shared memory of a block.
        warps: Warps of a block.
        occupancy: Part of the warps of a multiprocessor that fit at once.
        instruction: The matrix instruction, "" if there is none.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    occupancy: float
    instruction: str


class _Driver:
    """Stands in for a GPU's driver: Triton asks it what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _) -> int:
        return 0


@contextmanager
def without_gpu(target: GPUTarget) -> Iterator[None]:
    """Triton and what plans its launches take `target` for the device here; nothing is measured."""
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        (kernel.fn if isinstance(kernel, Autotuner) else kernel).device_caches.clear()
    precision = "tf32x3" if target.backend == "cuda" else "ieee"
    with (
        mock.patch.dict(os.environ, ICSD_TRITON_AUTOTUNE="0"),
        mock.patch.object(launch, "_processors", return_value=132),
        mock.patch.object(launch, "_accurate", return_value=precision),
    ):
        driver.set_active(_Driver(target))
        try:
            yield
        finally:
            driver._active = None  # there may be no driver to go back to


def compile_for(target: GPUTarget) -> dict[str, Resources]:
    """Every kernel, as launched for float32 (and the passes over bfloat16) at a usual shape of its regime."""
    found: dict[str, Resources] = {}
    suffix = ""

    def compile_(kernel, out, grid, *arguments, **constants) -> None:
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        compiled = compiled[0] if isinstance(compiled, list) else compiled
        name = compiled.metadata.name + suffix
        found.setdefault(name, _resources(compiled, target))

    with without_gpu(target), mock.patch.object(launch, "_launch", compile_):
        rehearse("sample", "kl", [torch.empty(1, 64, 65536, device="meta")] * 2, TEMPERATURES)
        rehearse("feature", "mse", [torch.empty(1, 8192, 256, device="meta")] * 2)
        rehearse("streamed", "kl", [torch.empty(1, 8192, 256, device="meta")] * 2, TEMPERATURES)
        suffix = " bfloat16"
        x = torch.empty(1, 64, 65536, dtype=torch.bfloat16, device="meta")
        launch.gram(x, torch.empty(1, 64, 64, device="meta"))
        launch.combine(torch.empty(1, 64, 64, device="meta"), x, torch.empty_like(x))
    return found


REGIMES = {"sample": sample_space, "feature": feature_space, "streamed": streamed}


def rehearse(
    regime: str,
    divergence: str,
    stages: Sequence[torch.Tensor],
    parameters: Sequence[float] = (),
    teacher_gradient: bool = False,
) -> None:
    """Launches what forward and backward of a distillation launch, on tensors `(groups, N, D)` without data."""
    how = Distillation([1.0] * (len(stages) - 1), divergence, list(parameters), 1e-8, teacher_gradient, regime)
    saved = torch.empty(saved_shape(stages, how), dtype=saved_dtype(stages, how), device="meta")
    outs = [*map(torch.empty_like, stages[:-1]), torch.empty_like(stages[-1]) if teacher_gradient else None]
    loss = REGIMES[regime].distill(stages, how, saved)
    REGIMES[regime].distill_backward(loss, saved, stages, outs, how)


def _resources(compiled, target: GPUTarget) -> Resources:
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    instruction = MATRIX_INSTRUCTION.search(assembly)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.backend == "cuda":
        registers, stack = _nvidia_usage(compiled.asm["cubin"])
        occupancy = _occupancy(target.arch, registers, shared, warps)
    else:
        registers, stack = (
            int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        waves = int(re.search(r"; Occupancy: (\d+)", assembly)[1])
        occupancy = waves / (16 if target.warp_size == 32 else 8)
    return Resources(registers, stack, shared, warps, round(occupancy, 2), instruction[1] if instruction else "")


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def _occupancy(capability: int, registers: int, shared: int, warps: int) -> float:
    """Of the warps of a multiprocessor; registers are handed out to warps by 256, shared memory has 1 KiB overhead."""
    most_warps, most_blocks, shared_kib = MULTIPROCESSORS[capability]
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = (shared_kib << 10) // (shared + 1024)
    return min(most_warps // warps, most_blocks, by_registers, by_shared) * warps / most_warps


def rows(table: dict[str, dict[str, Resources]]) -> Iterator[str]:
    """The table as Markdown: a row for each kernel and architecture."""
    yield "| kernel | architecture | registers | stack | shared memory | warps | occupancy | matrix instruction |"
    yield "|---|---|---|---|---|---|---|---|"
    names = next(iter(table.values()))
    for kernel in names:
        for architecture, found in table.items():
            cells = [str(cell) for cell in found[kernel][:-1]]
            yield f"| {kernel} | {architecture} | {' | '.join(cells)} | {found[kernel].instruction or '–'} |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pin", type=Path, metavar="FILE", help="write the table as JSON too")
    options = parser.parse_args()
    table, seconds = {}, {}
    for target in TARGETS:
        begin = time.process_time()
        table[str(target.arch)] = compile_for(target)
        seconds[str(target.arch)] = time.process_time() - begin
    if options.pin:
        lines = [
            json.dumps({"architecture": a, "kernel": k} | r._asdict()) for a, f in table.items() for k, r in f.items()
        ]
        head = json.dumps({"triton": triton.__version__})
        options.pin.write_text("[\n" + ",\n".join([head, *lines]) + "\n]\n")
    print("\n".join(rows(table)))
    print("\nProcessor time to compile a kernel (those of `TRITON_CACHE_DIR` cost nothing), in seconds:", end=" ")
    print(", ".join(f"{name} {total / len(table[name]):.2f}" for name, total in seconds.items()))


if __name__ == "__main__":
    main()
