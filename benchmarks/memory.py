"""The peak memory of a call beyond the memory in use before it."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from icsd.ops import empty_cache

PROCESS = Path("/proc/self")


@contextmanager
def frugal_process() -> Iterator[Executor]:
    """Start a process that returns freed memory at once, so that its resident memory is the memory in use."""
    variable = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(variable)
    os.environ[variable] = str(1 << 16)  # read by glibc when the process starts
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (torch.get_num_threads(),)) as executor:
            executor.submit(os.getpid).result()
            yield executor
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Return the peak of this process's resident memory during `call`, minus the resident memory before it.

    This counts all pages that are touched: tensors, the result, native buffers and the libraries' workspaces. Memory
    that a warm-up call leaves behind is not counted, except the memory that icsd keeps. Run it in a `frugal_process`.

    Raises:
        OSError: The system does not report the peak; Linux does.
    """
    call()
    gc.collect()
    empty_cache()
    (PROCESS / "clear_refs").write_text("5")  # sets the high-water mark to the present
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    (kibibytes,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(kibibytes)
