"""The unmodified CUDA backend on CPU tensors: its kernels, launches, binding and Python side, above the emulator."""

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

ROW_BLOCK_BYTES = 64 << 20  # of csrc/cuda/operator.h
PARTIAL_GRADIENT_BYTES = 64 << 20  # of csrc/cuda/banks.h
STREAM = 0x1C5D00  # the handle of the current stream


class EmulatedBackend(CUDABackend):
    """A CUDA backend whose device is emulated and takes CPU tensors.

    Args:
        mode: The mode in which its libraries are built, see harness.py. All but `plain` are built for sm_80 only, which
            takes half as long: kernels without tensor cores are the same for older devices.
        arch: The compute capability of the device.
        seed: The seed of the schedule.
    """

    name = "emulated"
    description = "CUDA kernels on the CPU"
    device_type = "cpu"

    def __init__(self, mode: str = "plain", arch: int = 80, seed: int = 1) -> None:
        super().__init__()
        self.architecture = arch
        built_for = arch if mode == "plain" else 80
        self.library = open_library(build_runtime(mode, built_for), seed)
        self.library.emulator_capability(arch)
        native = import_lazily(f"{mode}_{built_for}._native", build_native(mode, built_for))
        self.kernels = native.cuda
        self.launcher = CUDALauncher(native.cuda, native.Spec)

    def unavailable(self) -> None:
        return None

    def unsupported(self, tensors) -> str | None:
        return FusedBackend.unsupported(self, tensors)


@cache
def import_lazily(name: str, path: Path) -> ModuleType:
    """Import an extension module that has unresolved calls, which are never made.

    Its name must be its own: submodules are found by it.
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
    """Return the names of a library's kernels by their offsets. Kernels are local symbols."""
    symbols = (line.split(" ", 2) for line in run(["nm", "--demangle", library]).splitlines() if line[0] != " ")
    return {int(at, 16): name for at, kind, name in symbols if kind == "t"}  # thread-local variables have other offsets


class Launch(NamedTuple):
    """The counts of one launch.

    Attributes:
        kernel: The name of the kernel.
        threads: The threads of a block.
        shared: The bytes of dynamic shared memory of a block.
        bytes: The bytes read and written of each watched storage, by its address.
    """

    kernel: str
    threads: int
    shared: int
    bytes: dict[int, int]


class Traffic(TorchDispatchMode):
    """Counts the bytes that kernels read and write within a `with` block.

    It watches the given tensors and all that are made in the block.

    Args:
        library: The library of a backend in mode `counted`.
        tensors: Tensors that exist already.
    """

    def __init__(self, library, *tensors: torch.Tensor) -> None:
        super().__init__()
        self.library = library
        self.watched: list[torch.UntypedStorage] = []  # kept alive, so that no address is used twice
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
        """Return the bytes that memory moves if a cache holds all that is read or written more than once."""
        return sum(
            min(count, storage.nbytes()) for storage in self.watched for count in self.counts[storage.data_ptr()]
        )
