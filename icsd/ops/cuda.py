"""The compiled CUDA backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops import cpu
from icsd.ops.cpu import dense_inputs, native_regimes, native_spec
from icsd.ops.fused import Distillation, FusedBackend, sample_dense


class CUDABackend(FusedBackend):
    """CUDA C++ on the current stream of the tensors' device, with memory of PyTorch's allocator."""

    name = "cuda"
    description = "fused CUDA kernels"
    device_type = "cuda"

    def __init__(self) -> None:
        self.regimes = native_regimes()

    @cached_property
    def kernels(self) -> ModuleType | None:
        """`icsd._native.cuda`, if it was built."""
        return getattr(cpu._native, "cuda", None)

    @cached_property
    def architectures(self) -> list[int]:
        """Compute capabilities with machine code, e.g. 80."""
        return [int(architecture) for architecture in cpu._native.build["cuda"].split()]

    def unavailable(self) -> str | None:
        """Returns which of build, torch and device is missing, if one is."""
        if cpu._native is None:
            return cpu.CPUBackend().unavailable()
        if self.kernels is None:
            return (
                "the native module was built without CUDA; put nvcc on PATH (or set CUDA_HOME), run: pip install -e ."
            )
        built = "built for " + ", ".join(f"sm_{architecture}" for architecture in self.architectures)
        if torch.version.cuda is None:
            return f"{built}, but this torch ({torch.__version__}) was built without CUDA; install one with CUDA"
        if not torch.cuda.is_available():
            return f"{built}, no GPU here ({self.kernels.devices()[1]})"
        return None

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        reason = super().unsupported(tensors)
        if reason is not None:
            return reason
        major, minor = torch.cuda.get_device_capability(tensors[0].device)
        if runs_on(self.architectures, major, minor):
            return None
        built = ", ".join(f"sm_{architecture}" for architecture in self.architectures)
        device = f"{major}{minor}"
        return f"it is built for {built}, the device is sm_{device}; rebuild with ICSD_CUDA_ARCHITECTURES={device}"

    def launch_gram(self, x: Tensor) -> Tensor:
        return self.kernels.gram(sample_dense(x))

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        return self.kernels.combine(matrix.contiguous(), sample_dense(x))

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        return self.kernels.distill(dense_inputs(_same_dtype(stages, how)), native_spec(how), save)

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        inputs = dense_inputs(_same_dtype(stages, how))
        grads = self.kernels.distill_backward(grad.contiguous(), saved, inputs, wanted, native_spec(how))
        return [None if x is None else x.to(stage.dtype) for x, stage in zip(grads, stages, strict=True)]


def _same_dtype(stages: Sequence[Tensor], how: Distillation) -> Sequence[Tensor]:
    """Converts the inputs to what their regime takes: `streamed` one compute type, `feature` one type."""
    if how.regime == "sample" or len({stage.dtype for stage in stages}) == 1:
        return stages
    dtype = compute_dtype(*stages)
    if how.regime == "feature":
        return [stage.to(dtype) for stage in stages]
    return [stage if compute_dtype(stage) == dtype else stage.to(dtype) for stage in stages]


def runs_on(architectures: Sequence[int], major: int, minor: int) -> bool:
    """Tells whether a build for these architectures runs on a device.

    It does with machine code for the device's generation, or with the PTX of sm_80, which every build from 80 on has.
    """
    capability = 10 * major + minor
    if capability >= 80:
        return max(architectures) >= 80
    return any(architecture // 10 == major and architecture <= capability for architecture in architectures)
