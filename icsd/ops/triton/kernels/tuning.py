"""The choice of a kernel's block along the dimension that it streams: at most three candidates, measured once.

Everything else about a tile follows from the shape. The candidates differ in how many bytes a program has in flight,
and the widest that fits comes first. `ICSD_TRITON_AUTOTUNE=0` takes that one without measuring. Triton keeps the
measurements in its cache (`TRITON_CACHE_DIR`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
import triton
from torch import Tensor
from triton.runtime.autotuner import Autotuner

SHARED_BYTES = 64 << 10  # the least that a block may have on any target: AMD's CDNA3; NVIDIA's small chips have 99 KiB
REGISTERS = 80  # of a thread's 255, for sums and operands; addresses and copies in flight take the others
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


def tuning_class(*operands: Tensor) -> str:
    """Name the calls that share a measurement (`TUNED_FOR` of a kernel): those of equal dtypes and similar dimensions.

    Dimensions are rounded up to a power of four. Below 256 one block holds all features, and above 16,384 a program
    streams so many of them that their number no longer matters.
    """
    sizes = [(x.shape[-1] - 1).bit_length() for x in operands]
    return " ".join(f"{x.dtype}:{1 << min(14, max(8, n + n % 2))}" for x, n in zip(operands, sizes, strict=True))


class Tuner(Autotuner):
    """An `Autotuner` that does not measure a candidate that fits alone, as Triton's own from 3.8 on.

    Older ones call the kernel many times, which a launch that adds to its result must not be, and which needs a GPU.
    While a CUDA graph is being captured, nothing can be measured: then the first candidate is taken for good.
    """

    alone = False

    def prune_configs(self, kwargs: dict) -> list[triton.Config]:
        configs = super().prune_configs(kwargs)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            configs = configs[:1]
        self.alone = len(configs) == 1
        return configs

    def _bench(self, *arguments, config: triton.Config, **constants) -> list[float]:
        return [0.0, 0.0, 0.0] if self.alone else super()._bench(*arguments, config=config, **constants)


def tuned(key: Sequence[str], needs: Needs):
    """Return a decorator like `triton.autotune`: it chooses among the candidates that fit.

    Args:
        key: The kernel's arguments, beside `TUNED_FOR`, whose values need a measurement of their own.
        needs: Maps the kernel's arguments and BLOCK to the bytes that one buffer takes in shared memory, and to the
            bytes of sums and operands in registers. Operands count about five times, because several warps hold the
            same ones and tf32x3 splits each in two.
    """

    def fitting(configs: list[triton.Config], arguments: Mapping, **constants) -> list[triton.Config]:
        arguments = {**arguments, **constants}

        def fits(config: triton.Config) -> bool:
            buffer, held = needs(arguments, config.kwargs["BLOCK"])
            return buffer * config.num_stages <= SHARED_BYTES and held <= 4 * REGISTERS * 32 * config.num_warps

        wanted = not triton.knobs.runtime.interpret and os.environ.get("ICSD_TRITON_AUTOTUNE") != "0"
        # Every trial would add once more; and where groups are left out, it may have nothing to do.
        measured = wanted and not arguments.get("ADD") and arguments.get("only") is None
        fit = list(filter(fits, configs)) or configs[-1:]
        return fit[: CANDIDATES if measured else 1]

    def decorate(kernel: triton.JITFunction) -> Tuner:
        options = {"reset_to_zero": None, "restore_value": None, "cache_results": True}
        options["prune_configs_by"] = {"early_config_prune": fitting}
        return Tuner(kernel, kernel.arg_names, CONFIGS, ["TUNED_FOR", *key], **options)

    return decorate
