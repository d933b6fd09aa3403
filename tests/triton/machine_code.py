"""Compile the Triton kernels for every architecture, without a GPU, and read from the machine code what they need.

`python tests/triton/machine_code.py` renews resources.json, after a change that is meant to change it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import Autotuner, driver

from icsd.losses import KL, SimilarityLoss
from icsd.ops.contract import Spec, saved_dtype, saved_shape
from icsd.ops.triton import banks, feature, kernels, runtime, sample, streamed
from tools.kernel_cases import CASES, TEMPERATURES, Case
from tools.occupancy import occupancy

NVIDIA = [80, 86, 89, 90, 100, 120]
AMD = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32}
TARGETS = [GPUTarget("cuda", capability, 32) for capability in NVIDIA] + [
    GPUTarget("hip", name, width) for name, width in AMD.items()
]

TABLE = Path(__file__).with_name("resources.json")
TO_BANKS = Case("banks", "kl", "float32", 256, 256)
BANK_SAMPLES = 65_536
MATRIX_INSTRUCTION = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma_f\d+|v_wmma_f\d+)")


class Resources(NamedTuple):
    """The resources of a kernel on an architecture.

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
    """A driver without a GPU, which Triton asks for the target to compile for."""

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
    """Let Triton compile, and launches be planned, for `target`; nothing is measured."""
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        (kernel.fn if isinstance(kernel, Autotuner) else kernel).device_caches.clear()
    precision = "tf32x3" if target.backend == "cuda" else "ieee"
    with (
        mock.patch.dict(os.environ, ICSD_TRITON_AUTOTUNE="0"),
        mock.patch.object(runtime, "processors", return_value=132),
        mock.patch.object(runtime, "fastest_precision", return_value=precision),
    ):
        driver.set_active(_Driver(target))
        try:
            yield
        finally:
            driver._active = None  # there may be no driver to go back to


def compile_for(target: GPUTarget) -> dict[tuple[str, str, str], Resources]:
    """Compile what the distillations of `CASES` and that to banks launch.

    Returns:
        The resources by regime, dtype and kernel.
    """
    found: dict[tuple[str, str, str], Resources] = {}

    def compile_(kernel, out, grid, *arguments, **constants) -> None:
        if case is TO_BANKS and not isinstance(kernel, Autotuner):
            return  # only the products need much
        compiled = kernel.warmup(*arguments, grid=(1,), **constants)
        compiled = compiled[0] if isinstance(compiled, list) else compiled
        found.setdefault((case.regime, case.dtype, compiled.metadata.name), _resources(compiled, target))

    with without_gpu(target), mock.patch.object(runtime, "launch", compile_):
        for case in CASES:
            x = torch.empty(1, case.samples, case.dim, dtype=getattr(torch, case.dtype), device="meta")
            dry_run(case.regime, case.loss, [x, torch.empty_like(x)], TEMPERATURES)
        case = TO_BANKS
        x, bank = (torch.empty(samples, case.dim, device="meta") for samples in (case.samples, BANK_SAMPLES))
        dry_run_to_banks(KL(*TEMPERATURES[:2]), [x, torch.empty_like(x), bank, bank], [True, False, False, False])
    return found


REGIMES = {"sample": sample, "feature": feature, "streamed": streamed}


def dry_run(
    regime: str,
    loss: str,
    stages: Sequence[torch.Tensor],
    parameters: Sequence[float] = (),
    teacher_gradient: bool = False,
) -> None:
    """Run the forward and the backward pass of a distillation on tensors `(groups, N, D)` without data."""
    spec = Spec(loss, tuple(parameters), (1.0,) * (len(stages) - 1), 1e-8, teacher_gradient, regime)
    saved = torch.empty(saved_shape(stages, spec), dtype=saved_dtype(stages, spec), device="meta")
    outs = [*map(torch.empty_like, stages[:-1]), torch.empty_like(stages[-1]) if teacher_gradient else None]
    value = REGIMES[regime].distill(stages, spec, saved)
    REGIMES[regime].distill_backward(value, saved, stages, outs, spec)


def dry_run_to_banks(loss: SimilarityLoss, features: Sequence[torch.Tensor], wanted: Sequence[bool]) -> None:
    """Run the only pass of a distillation to banks on tensors without data."""
    banks.distill(features, wanted, loss, 1e-8)


def _resources(compiled, target: GPUTarget) -> Resources:
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    instruction = MATRIX_INSTRUCTION.search(assembly)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.backend == "cuda":
        registers, stack = _nvidia_usage(compiled.asm["cubin"])
        filled = occupancy(target.arch, registers, shared, warps)
    else:
        registers, stack = (
            int(re.search(rf"\.{key}:\s+(\d+)", assembly)[1]) for key in ("vgpr_count", "private_segment_fixed_size")
        )
        waves = int(re.search(r"; Occupancy: (\d+)", assembly)[1])
        filled = waves / (16 if target.warp_size == 32 else 8)
    return Resources(registers, stack, shared, warps, round(filled, 2), instruction[1] if instruction else "")


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and stack, read by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def main() -> None:
    """Write resources.json and print how long the compiler took; kernels in Triton's cache take no time."""
    lines = [json.dumps({"triton": triton.__version__})]
    for target in TARGETS:
        begin = sum(os.times()[:4])  # ptxas is a process of its own
        found = compile_for(target)
        seconds = (sum(os.times()[:4]) - begin) / len(found)
        print(f"{target.arch}: {seconds:.2f} s of processor time for each kernel")
        for (regime, dtype, kernel), resources in found.items():
            row = {"architecture": str(target.arch), "regime": regime, "dtype": dtype, "kernel": kernel}
            lines.append(json.dumps(row | resources._asdict()))
    TABLE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
