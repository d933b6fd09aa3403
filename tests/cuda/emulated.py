"""The CUDA backend as it is, on CPU tensors: kernels, launchers, binding and Python side with the emulator beneath."""

import os
import sys
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from harness import build_native, build_runtime, open_library, run
from resources import short
from torch.utils._python_dispatch import TorchDispatchMode

from icsd.ops.backend import FusedBackend
from icsd.ops.cuda import CUDABackend, CUDALauncher


class EmulatedBackend(CUDABackend):
    """Takes CPU tensors for those of a device of capability `arch`, its library built in `mode` (see harness.py)."""

    name = "emulated"
    description = "CUDA kernels on the CPU"
    device_type = "cpu"

    def __init__(self, mode: str = "plain", arch: int = 80, seed: int = 1) -> None:
        super().__init__()
        self.architecture = arch
        self.library = open_library(build_runtime(mode, arch), seed)
        native = import_lazily(f"{mode}_{arch}._native", build_native(mode, arch))
        self.kernels = native.cuda
        self.launcher = CUDALauncher(native.cuda, native.Spec)

    def unavailable(self) -> None:
        return None

    def unsupported(self, tensors) -> str | None:
        return FusedBackend.unsupported(self, tensors)


def import_lazily(name: str, path: Path) -> ModuleType:
    """An extension module some of whose calls are not resolved, and not made.

    Its submodules are found by its name, which is therefore its own.
    """
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        loader = ExtensionFileLoader(name, str(path))
        module = module_from_spec(spec_from_loader(name, loader))
        loader.exec_module(module)
    finally:
        sys.setdlopenflags(before)
    return module


@cache
def kernel_names(library: str) -> dict[int, str]:
    """By their place in a library: they have no names to be linked by."""
    symbols = (line.split(" ", 2) for line in run(["nm", "--demangle", library]).splitlines() if line[0] != " ")
    return {int(at, 16): name for at, kind, name in symbols if kind == "t"}  # what is local to a thread has offsets


class Launch(NamedTuple):
    """What `Traffic` counts of one.

    Attributes:
        kernel: Its name.
        threads: Of a block.
        shared: Bytes of dynamic shared memory of a block.
        bytes: Read and written, by the address of what is watched.
    """

    kernel: str
    threads: int
    shared: int
    bytes: dict[int, int]


class Traffic(TorchDispatchMode):
    """Counts what kernels read and write within its `with` block, of given tensors and of all that are made there.

    Args:
        library: Of a backend in mode `counted`.
        tensors: Those that are there already.
    """

    def __init__(self, library, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.library = library
        self.watched: list[torch.UntypedStorage] = []  # alive: no address is used twice
        self.counts: dict[int, tuple[int, int]] = {}  # bytes read and written, by address
        self.launches: list[Launch] = []
        self.before = library.emulator_launches()
        for tensor in tensors:
            self.watch(tensor)

    def watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() and all(storage.data_ptr() != other.data_ptr() for other in self.watched):
            self.library.emulator_watch(storage.data_ptr(), storage.nbytes())
            self.watched.append(storage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor)
        return result

    def __exit__(self, *exception) -> None:
        for number, storage in enumerate(self.watched):
            counts = self.library.emulator_bytes_read(number), self.library.emulator_bytes_written(number)
            self.counts[storage.data_ptr()] = counts
        self.launches = [self._launch(number) for number in range(self.library.emulator_launches() - self.before)]
        self.library.emulator_unwatch()
        super().__exit__(*exception)

    def read(self, tensor: torch.Tensor) -> int:
        return self.counts[tensor.untyped_storage().data_ptr()][0]

    def written(self, tensor: torch.Tensor) -> int:
        return self.counts[tensor.untyped_storage().data_ptr()][1]

    def _launch(self, number: int) -> Launch:
        bytes_ = {}
        for position, storage in enumerate(self.watched):
            until = [
                [count(launch, position) if launch >= 0 else 0 for launch in (number - 1, number)]
                for count in (self.library.emulator_bytes_read_until, self.library.emulator_bytes_written_until)
            ]
            bytes_[storage.data_ptr()] = sum(after - before for before, after in until)
        at = self.before + number
        names = kernel_names(self.library.emulator_launch_library(at).decode())
        return Launch(
            short(names[self.library.emulator_launch_offset(at)]),
            self.library.emulator_launch_threads(at),
            self.library.emulator_launch_shared(at),
            bytes_,
        )

    def of_memory(self) -> int:
        """Bytes that memory must give and take, where a cache keeps what is read or written more than once."""
        return sum(
            min(count, storage.nbytes()) for storage in self.watched for count in self.counts[storage.data_ptr()]
        )
