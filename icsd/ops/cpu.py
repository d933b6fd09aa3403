"""The compiled CPU backend: tensors to the raw pointers of `icsd._native`."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch  # before the native module, so that both share torch's OpenMP pool
from torch import Tensor

from icsd.ops.divergences import KERNELS
from icsd.ops.fused import Distillation, FusedBackend, saved_dtype, saved_shape
from icsd.ops.gram import compute_dtype
from icsd.ops.pointers import NO_FEATURES, features_of, groups_of, sample_dense

try:
    from icsd import _native

    _DISTILL = {
        "sample": _native.distill,
        "feature": _native.distill_feature,
        "streamed": _native.distill_streamed,
    }
    _DISTILL_BACKWARD = {"feature": _native.distill_feature_backward, "streamed": _native.distill_streamed_backward}
except (ImportError, AttributeError) as error:  # not built, or built from older sources
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
        x = sample_dense(x)
        *groups, n, _ = x.shape
        out = _empty((*groups, n, n), compute_dtype(x), x)
        _native.gram(features_of(x), groups_of(x), n, out.data_ptr())
        return out

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        _thread.prepare()
        x, matrix = sample_dense(x), matrix.contiguous()
        out = _empty((*matrix.shape[:-1], x.shape[-1]), x.dtype, x)
        _native.combine(
            matrix.data_ptr(), matrix.shape[-2], features_of(x), groups_of(x), x.shape[-2], features_of(out)
        )
        return out

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        _thread.prepare()
        stages = [sample_dense(stage) for stage in stages]
        *groups, n, _ = stages[0].shape
        loss = _empty(groups, compute_dtype(*stages), stages[0])
        saved = _empty(saved_shape(stages, how) if save else (0,), saved_dtype(stages, how), loss)
        _DISTILL[how.regime](
            [features_of(stage) for stage in stages],
            loss.numel(),
            n,
            *_arguments(how),
            loss.data_ptr(),
            saved.data_ptr() if save else 0,
        )
        return loss, saved

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        _thread.prepare()
        grad = grad.contiguous()
        stages = [sample_dense(stage) for stage in stages]
        outs = [_empty(x.shape, x.dtype, x) if want else None for x, want in zip(stages, wanted, strict=True)]
        features = [features_of(stage) for stage in stages]
        results = [NO_FEATURES if out is None else features_of(out) for out in outs]
        addresses = grad.data_ptr(), saved.data_ptr()
        if how.regime == "sample":
            wide = saved.dtype == torch.float64
            _native.distill_backward(*addresses, features, results, wide, grad.numel(), saved.shape[-2])
        else:
            n = stages[0].shape[-2]
            _DISTILL_BACKWARD[how.regime](*addresses, features, results, grad.numel(), n, *_arguments(how))
        return outs


def empty_cache() -> None:
    """Gives the system back the CPU memory that is kept for results and scratch to come.

    It may take that memory by itself when it runs short; this is for those who watch what a process holds.
    """
    if _native is not None:
        _native.empty_cache()


def _empty(shape: Sequence[int], dtype: torch.dtype, beside: Tensor) -> Tensor:
    """Memory for a result; where it is large, of the native module, which keeps what is freed for the next."""
    numbers = math.prod(shape)
    if numbers * dtype.itemsize < _native.LARGE_BYTES:  # each by the form that PyTorch parses in the least time
        if shape:
            return beside.new_empty(*shape, dtype=dtype)
        return beside.new_empty_strided((), (), dtype=dtype)
    memory = _native.Allocation(numbers * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype, count=numbers).resize_(shape)


def _arguments(how: Distillation) -> tuple[Sequence[float], int, list[float], float, bool]:
    """The native module's (weights, divergence, parameters, eps, teacher_gradient)."""
    return how.weights, KERNELS[how.divergence], how.parameters, how.eps, how.teacher_gradient
