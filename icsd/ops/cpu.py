"""The compiled CPU backend: the functions of `icsd._native.cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor  # torch before the native module, so that both share its OpenMP pool

from icsd.ops.fused import Distillation, FusedBackend, sample_dense

INTERFACE = 2  # of csrc/binding/module.cpp

try:
    from icsd import _native

    if _native.INTERFACE != INTERFACE:
        raise ImportError(f"its interface is {_native.INTERFACE}, not {INTERFACE}")
except (ImportError, AttributeError) as error:  # not built, or built from other sources
    _native = None
    _import_error = str(error)


class CPUBackend(FusedBackend):
    """C++ with OpenMP; AMX, AVX-512, AVX2 or portable code is chosen at run time."""

    name = "cpu"
    description = "fused C++ kernels"
    device_type = "cpu"

    def __init__(self) -> None:
        self.regimes = native_regimes()

    def unavailable(self) -> str | None:
        """Returns why the native module cannot be used, if it cannot."""
        if _native is None:
            return f"the native module is not built from these sources ({_import_error}); run: pip install -e ."
        return None

    def launch_gram(self, x: Tensor) -> Tensor:
        return _native.cpu.gram(sample_dense(x))

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        return _native.cpu.combine(matrix.contiguous(), sample_dense(x))

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        return _native.cpu.distill(dense_inputs(stages), native_spec(how), save)

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        return _native.cpu.distill_backward(grad.contiguous(), saved, dense_inputs(stages), wanted, native_spec(how))


def empty_cache() -> None:
    """Returns to the system the CPU memory that is kept for later results and workspaces.

    The system may take that memory by itself when it runs short. This is for programs that watch what a process holds.
    """
    if _native is not None:
        _native.empty_cache()


def native_regimes() -> dict[str, tuple[str, ...]]:
    """Returns the regimes that the native module has for each loss that it has kernels for."""
    if _native is None:
        return {}
    return dict.fromkeys(_native.LOSSES, ("sample", "streamed")) | {"mse": ("sample", "feature", "streamed")}


def dense_inputs(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors as the native module takes them, see `sample_dense`."""
    return [x if x.is_contiguous() else sample_dense(x) for x in inputs]


def native_spec(how: Distillation) -> _native.Spec:
    """Returns the native module's form of a specification, which is made once."""
    return _make_spec(how.loss, tuple(how.parameters), tuple(how.weights), how.eps, how.teacher_gradient, how.regime)


@lru_cache(maxsize=256)
def _make_spec(*arguments) -> _native.Spec:
    return _native.Spec(*arguments)
