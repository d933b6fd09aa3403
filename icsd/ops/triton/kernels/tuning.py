"""The choice of a kernel's tile along what it streams: at most three candidates, measured once for each shape.

What else a tile is made of follows from the shape (`launch.py`). Candidates differ in how many bytes a program has in
flight; the widest that fits comes first. `ICSD_TRITON_AUTOTUNE=0` takes it without measuring. Measurements are kept in
Triton's cache (`TRITON_CACHE_DIR`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import triton

SHARED_BYTES = 64 << 10  # the least of a block on any target: AMD's CDNA3; NVIDIA's small chips have 99 KiB
REGISTERS = 80  # of a thread's 255, for sums and operands; addresses and copies on their way take the others
CANDIDATES = 3

CONFIGS = [
    triton.Config({"BLOCK": 256}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 64}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK": 64}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK": 32}, num_warps=8, num_stages=2),
    triton.Config({"BLOCK": 32}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 16}, num_warps=8, num_stages=2),
]

Needs = Callable[[Mapping, int], tuple[int, int]]


def tuned(key: Sequence[str], needs: Needs):
    """A decorator: `triton.autotune` among the candidates that fit.

    Args:
        key: Arguments of the kernel whose values ask for a measurement of their own.
        needs: From the kernel's arguments and BLOCK, the bytes of a stage in shared memory, and of the sums and the
            operands in registers: about five times their bytes, since warps share them and tf32x3 splits them in two.
    """

    def fitting(configs: list[triton.Config], arguments: Mapping, **constants) -> list[triton.Config]:
        arguments = {**arguments, **constants}

        def fits(config: triton.Config) -> bool:
            stage, held = needs(arguments, config.kwargs["BLOCK"])
            return stage * config.num_stages <= SHARED_BYTES and held <= 4 * REGISTERS * 32 * config.num_warps

        wanted = not triton.knobs.runtime.interpret and os.environ.get("ICSD_TRITON_AUTOTUNE") != "0"
        measured = wanted and not arguments.get("ADD")  # every trial would add once more
        fit = list(filter(fits, configs)) or configs[-1:]
        return fit[: CANDIDATES if measured else 1]

    return triton.autotune(CONFIGS, list(key), prune_configs_by={"early_config_prune": fitting}, cache_results=True)
