"""The compiled CPU backend, by the functions of `icsd._native`."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch  # before the native module, so that both share torch's OpenMP pool
from torch import Tensor

from icsd.losses import KERNELS
from icsd.ops.fused import Distillation, FusedBackend, sample_dense

INTERFACE = 1  # of csrc/binding/module.cpp

try:
    from icsd import _native

    if _native.INTERFACE != INTERFACE:
        raise ImportError(f"its interface is {_native.INTERFACE}, not {INTERFACE}")
except (ImportError, AttributeError) as error:  # not built, or built from other sources
    _native = None
    _import_error = str(error)


class _Thread(threading.local):
    """What each Python thread does once: OpenMP has a count of threads for each, which torch sets when it is asked."""

    def __init__(self) -> None:
        torch.get_num_threads()

    def prepare(self) -> None:
        """Has `torch.set_num_threads` respected in this thread."""


_thread = _Thread()


class CPUBackend(FusedBackend):
    """C++ with OpenMP; AMX, AVX-512, AVX2 or portable code is chosen at run time."""

    name = "cpu"
    description = "fused C++ kernels"
    device_type = "cpu"
    regimes = dict.fromkeys(KERNELS, ("sample", "streamed")) | {"mse": ("sample", "feature", "streamed")}

    def unavailable(self) -> str | None:
        """Why the native module is not there, if it is not."""
        if _native is None:
            return f"the native module is not built from these sources ({_import_error}); run: pip install -e ."
        return None

    def launch_gram(self, x: Tensor) -> Tensor:
        _thread.prepare()
        return _native.gram(sample_dense(x))

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        _thread.prepare()
        return _native.combine(matrix.contiguous(), sample_dense(x))

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        _thread.prepare()
        return _native.distill([sample_dense(stage) for stage in stages], save, *_arguments(how))

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        _thread.prepare()
        stages = [sample_dense(stage) for stage in stages]
        return _native.distill_backward(grad.contiguous(), saved, stages, wanted, *_arguments(how))


def empty_cache() -> None:
    """Gives the system back the CPU memory that is kept for results and scratch to come.

    It may take that memory by itself when it runs short; this is for those who watch what a process holds.
    """
    if _native is not None:
        _native.empty_cache()


def _arguments(how: Distillation) -> tuple[Sequence[float], int, list[float], float, bool, str]:
    """As the native module takes them: a loss by its number."""
    return how.weights, KERNELS[how.loss], how.parameters, how.eps, how.teacher_gradient, how.regime
