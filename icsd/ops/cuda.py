"""The compiled CUDA backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from icsd.losses import KERNELS
from icsd.losses.gram import compute_dtype
from icsd.ops import cpu
from icsd.ops.fused import Distillation, FusedBackend, sample_dense, saved_dtype, saved_shape

# Of the rows of N x N matrices that streaming has at a time, unless a tile's rows are more.
BAND_BYTES = 64 << 20


class CUDABackend(FusedBackend):
    """CUDA C++ on the current stream of the tensors' device, with workspaces of PyTorch's allocator."""

    name = "cuda"
    description = "fused CUDA kernels"
    device_type = "cuda"
    regimes = dict.fromkeys(KERNELS, ("sample", "streamed")) | {"mse": ("sample", "feature", "streamed")}

    @cached_property
    def kernels(self) -> ModuleType | None:
        """`icsd._native.cuda`, if it was built."""
        return getattr(cpu._native, "cuda", None)

    @cached_property
    def architectures(self) -> list[int]:
        """Compute capabilities with machine code, e.g. 80."""
        return [int(architecture) for architecture in cpu._native.build["cuda"].split()]

    def unavailable(self) -> str | None:
        """Which of build, torch and device is missing, if one is."""
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

    @contextmanager
    def on_stream(self, x: Tensor) -> Iterator[int]:
        """Makes the device of `x` the current one; gives its current stream."""
        with torch.cuda.device(x.device):
            yield torch.cuda.current_stream(x.device).cuda_stream

    def launch_gram(self, x: Tensor) -> Tensor:
        x = sample_dense(x)
        out = x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=compute_dtype(x))
        with self.on_stream(x) as stream:
            self.kernels.gram(x, out, _workspace(x, self.kernels.gram_workspace(x)), stream)
        return out

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        x = sample_dense(x)
        out = x.new_empty((*matrix.shape[:-1], x.shape[-1]))
        with self.on_stream(x) as stream:
            self.kernels.combine(matrix.contiguous(), x, out, stream)
        return out

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        stages = _stages(stages, how)
        loss = stages[0].new_empty(stages[0].shape[:-2], dtype=compute_dtype(*stages))
        saved = stages[0].new_empty(saved_shape(stages, how) if save else 0, dtype=saved_dtype(stages, how))
        arguments = stages, *_arguments(how), loss, saved if save else None
        with self.on_stream(loss) as stream:
            if how.regime == "sample":
                workspace = self.kernels.distill_workspace(stages, KERNELS[how.loss], save)
                self.kernels.distill(*arguments, _workspace(loss, workspace), stream)
            elif how.regime == "feature":
                workspace = self.kernels.feature_workspace(stages, save)
                self.kernels.distill_feature(*arguments, _workspace(loss, workspace), stream)
            else:
                workspace = self.kernels.streamed_workspace(stages, False, save, BAND_BYTES)
                self.kernels.distill_streamed(*arguments, BAND_BYTES, _workspace(loss, workspace), stream)
        return loss, saved

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        dtypes = [stage.dtype for stage in stages]
        stages = _stages(stages, how)
        pairs = zip(stages, wanted, strict=True)
        outs = [torch.empty_like(x, memory_format=torch.contiguous_format) if want else None for x, want in pairs]
        arguments = grad.contiguous(), saved, stages, outs
        with self.on_stream(saved) as stream:
            if how.regime == "sample":
                self.kernels.distill_backward(*arguments, how.weights, how.teacher_gradient, stream)
            elif how.regime == "feature":
                workspace = _workspace(saved, self.kernels.feature_backward_workspace(stages))
                self.kernels.distill_feature_backward(*arguments, *_arguments(how), workspace, stream)
            else:
                workspace = _workspace(saved, self.kernels.streamed_workspace(stages, wanted[-1], True, BAND_BYTES))
                self.kernels.distill_streamed_backward(*arguments, *_arguments(how), BAND_BYTES, workspace, stream)
        return [None if out is None else out.to(dtype) for out, dtype in zip(outs, dtypes, strict=True)]


def _workspace(beside: Tensor, size: int) -> Tensor:
    """So many bytes."""
    return beside.new_empty(size, dtype=torch.uint8)


def _stages(stages: Sequence[Tensor], how: Distillation) -> list[Tensor]:
    """As the kernels take them: dense samples; streamed stages of one compute type, those of moments of one type."""
    dtype = compute_dtype(*stages)
    if how.regime == "streamed":
        stages = [stage if compute_dtype(stage) == dtype else stage.to(dtype) for stage in stages]
    elif how.regime == "feature" and len({stage.dtype for stage in stages}) > 1:
        stages = [stage.to(dtype) for stage in stages]
    return [sample_dense(stage) for stage in stages]


def _arguments(how: Distillation) -> tuple[Sequence[float], int, list[float], float, bool]:
    """The native module's (weights, loss, parameters, eps, teacher_gradient)."""
    return how.weights, KERNELS[how.loss], how.parameters, how.eps, how.teacher_gradient


def runs_on(architectures: Sequence[int], major: int, minor: int) -> bool:
    """Whether a device has code among these: of its own generation, or sm_80's PTX, which comes with all from 80 on."""
    capability = 10 * major + minor
    if capability >= 80:
        return max(architectures) >= 80
    return any(architecture // 10 == major and architecture <= capability for architecture in architectures)
