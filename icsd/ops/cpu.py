"""The compiled CPU backend: the functions of `icsd._native.cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

from torch import Tensor  # before the native module, so that both share torch's OpenMP pool

from icsd.ops.backend import FusedBackend
from icsd.ops.contract import Spec, sample_dense

INTERFACE = 7  # of csrc/binding/module.cpp

try:
    import icsd._native as _native  # so that an error names it

    if _native.INTERFACE != INTERFACE:
        raise ImportError(f"its interface is {_native.INTERFACE}, not {INTERFACE}")
except (ImportError, AttributeError) as error:  # not built, or built from other sources
    _native = None
    _import_error = str(error)


class NativeLauncher:
    """The functions of `icsd._native.cpu` or `icsd._native.cuda`, with tensors and specs as they take them.

    Args:
        module: The native functions.
        spec: The type of the native specifications.
    """

    def __init__(self, module: ModuleType, spec: type) -> None:
        self.module = module
        self.spec = lru_cache(maxsize=256)(spec)
        self.reads = module.reads

    def gram(self, x: Tensor) -> Tensor:
        return self.module.gram(sample_dense(x))

    def combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        return self.module.combine(matrix.contiguous(), sample_dense(x))

    def distill(self, inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]:
        return self.module.distill(
            [x if x.is_contiguous() else sample_dense(x) for x in inputs], self.spec(*spec), save
        )

    def distill_backward(
        self, grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]:
        inputs = [x if x.is_contiguous() else sample_dense(x) for x in inputs]
        return self.module.distill_backward(grad.contiguous(), saved.contiguous(), inputs, wanted, self.spec(*spec))


class CPUBackend(FusedBackend):
    """C++ with OpenMP; AMX, AVX-512, AVX2 or portable code is chosen at run time."""

    name = "cpu"
    description = "fused C++ kernels"
    device_type = "cpu"
    centers = True

    def __init__(self) -> None:
        self.regimes = native_regimes()
        if _native is not None:
            self.ready = True
            self.launcher = NativeLauncher(_native.cpu, _native.Spec)
            self.bank_passes = _native.cpu

    def unavailable(self) -> str | None:
        """Return why the native module cannot be used, if it cannot."""
        if _native is None:
            return f"the native module is not built from these sources ({_import_error}); run: pip install -e ."
        return None


def empty_cache() -> None:
    """Return to the system the CPU memory that is kept for later results and workspaces.

    The system may take that memory by itself when it runs short. This is for programs that watch what a process holds.
    """
    if _native is not None:
        _native.empty_cache()


def native_regimes() -> dict[str, tuple[str, ...]]:
    """Return the regimes that the native module has for each loss that it has kernels for."""
    if _native is None:
        return {}
    return dict.fromkeys(_native.LOSSES, ("sample", "streamed")) | {"mse": ("sample", "feature", "streamed")}
