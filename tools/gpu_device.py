"""The GPU that `tools.first_hour` tries out or, with `ICSD_EMULATED=1`, the emulator of tests/cuda in its place."""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

EMULATED = os.environ.get("ICSD_EMULATED") == "1"
ROOT = Path(__file__).parents[1]
REPEATS = 20
FLUSHED_BYTES = 512 << 20  # more than the L2 cache of any device

Call = Callable[[], object]
T = TypeVar("T")


class GPU:
    """The CUDA device of this machine."""

    backend = "cuda"
    device = "cuda"

    def unavailable(self) -> str | None:
        """Return why there is nothing to try out, if there is not."""
        from icsd.ops.cuda import CUDABackend

        return CUDABackend().unavailable()

    def describe(self) -> dict[str, object]:
        """Return the columns that name the device and its software."""
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }

    def choose(self, full: T, emulated: T) -> T:
        """Return what is measured or checked on a GPU, or what the emulator takes in its place."""
        return full

    @cached_property
    def _flushed(self) -> torch.Tensor:
        return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, call: Call) -> float:
        """Return the median time of a call with cold caches. The device is busy while the host enqueues the call."""
        times = []
        for _ in range(3):
            call()
        for _ in range(REPEATS):
            self._flushed.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times) / 1e3

    def captured(self, call: Call) -> Call:
        """Return the replay of a CUDA graph of the call."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def kernels(self, call: Call) -> dict[str, float]:
        """Return the seconds of each kernel of a call with cold caches, in the order of their first launches."""
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(REPEATS):
                self._flushed.zero_()
                call()
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for event in sorted(profile.events(), key=lambda event: event.time_range.start):
            if "icsd::" in event.name:
                times.setdefault(short_name(event.name), []).append(event.time_range.elapsed_us())
        return {name: sum(all_) / REPEATS / 1e6 for name, all_ in times.items()}


class Emulator(GPU):
    """The emulated device, with few and small cases. Its times mean nothing."""

    backend = "emulated"
    device = "cpu"

    def __init__(self) -> None:
        from icsd.ops import registry

        sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests" / "support")]
        from emulated import EmulatedBackend

        registry.register(EmulatedBackend())

    def unavailable(self) -> None:
        """Return None: it always runs."""

    def describe(self) -> dict[str, object]:
        return {"device": "emulator", "capability": "8.0", "multiprocessors": 4, "cuda": None}

    def choose(self, full: T, emulated: T) -> T:
        return emulated

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def captured(self, call: Call) -> Call:
        return call

    def kernels(self, call: Call) -> dict[str, float]:
        return {"emulated": self.seconds(call)}


def open_device() -> GPU:
    """Return the device to be tried out."""
    return Emulator() if EMULATED else GPU()


def short_name(kernel: str) -> str:
    """Return `gram_tensor<float, 1>` for the name of a kernel with its namespaces and arguments."""
    name = re.sub(r"\(anonymous namespace\)::|icsd::(cuda::)?|^void |__(nv_)?", "", kernel)
    return re.sub(r"\(.*", "", name)
