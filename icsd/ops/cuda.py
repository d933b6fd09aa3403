"""The compiled CUDA backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from icsd.ops import cpu
from icsd.ops.divergences import KERNELS
from icsd.ops.fused import Distillation, FusedBackend, saved_dtype, saved_shape
from icsd.ops.gram import compute_dtype
from icsd.ops.pointers import NO_FEATURES, features_of, groups_of, sample_dense

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
        *groups, n, _ = x.shape
        out = x.new_empty((*groups, n, n), dtype=compute_dtype(x))
        batch = features_of(x), groups_of(x), n
        with self.on_stream(x) as stream:
            workspace = x.new_empty(self.kernels.gram_workspace(*batch), dtype=torch.uint8)
            self.kernels.gram(*batch, out.data_ptr(), workspace.data_ptr(), stream)
        return out

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        x, matrix = sample_dense(x), matrix.contiguous()
        out = x.new_empty((*matrix.shape[:-1], x.shape[-1]))
        *_, m, n = matrix.shape
        with self.on_stream(x) as stream:
            self.kernels.combine(matrix.data_ptr(), m, features_of(x), groups_of(x), n, features_of(out), stream)
        return out

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        stages = _stages(stages, how)
        *groups, n, _ = stages[0].shape
        loss = stages[0].new_empty(groups, dtype=compute_dtype(*stages))
        saved = stages[0].new_empty(saved_shape(stages, how) if save else 0, dtype=saved_dtype(stages, how))
        batch = [features_of(stage) for stage in stages], loss.numel(), n
        with self.on_stream(loss) as stream:
            results = loss.data_ptr(), saved.data_ptr() if save else 0
            if how.regime == "sample":
                size = self.kernels.distill_workspace(*batch, KERNELS[how.divergence], save)
                workspace = loss.new_empty(size, dtype=torch.uint8)
                self.kernels.distill(*batch, *_arguments(how), *results, workspace.data_ptr(), stream)
            elif how.regime == "feature":
                workspace = loss.new_empty(self.kernels.feature_workspace(*batch, save), dtype=torch.uint8)
                self.kernels.distill_feature(*batch, *_arguments(how), *results, workspace.data_ptr(), stream)
            else:
                size = self.kernels.streamed_workspace(*batch, False, save, BAND_BYTES)
                workspace = loss.new_empty(size, dtype=torch.uint8)
                addresses = BAND_BYTES, workspace.data_ptr()
                self.kernels.distill_streamed(*batch, *_arguments(how), *results, *addresses, stream)
        return loss, saved

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        dtypes = [stage.dtype for stage in stages]
        grad, stages = grad.contiguous(), _stages(stages, how)
        pairs = zip(stages, wanted, strict=True)
        outs = [torch.empty_like(x, memory_format=torch.contiguous_format) if want else None for x, want in pairs]
        features = [features_of(stage) for stage in stages]
        results = [NO_FEATURES if out is None else features_of(out) for out in outs]
        batch = grad.numel(), stages[0].shape[-2]
        with self.on_stream(saved) as stream:
            if how.regime == "sample":
                wide = saved.dtype == torch.float64
                self.kernels.distill_backward(
                    grad.data_ptr(), saved.data_ptr(), features, results, wide, *batch, stream
                )
            else:
                addresses = grad.data_ptr(), saved.data_ptr()
                arguments = features, results, *batch, *_arguments(how)
                if how.regime == "feature":
                    size = self.kernels.feature_backward_workspace(features, *batch)
                    workspace = saved.new_empty(size, dtype=torch.uint8)
                    self.kernels.distill_feature_backward(*addresses, *arguments, workspace.data_ptr(), stream)
                else:
                    size = self.kernels.streamed_workspace(features, *batch, wanted[-1], True, BAND_BYTES)
                    workspace = saved.new_empty(size, dtype=torch.uint8)
                    memory = BAND_BYTES, workspace.data_ptr()
                    self.kernels.distill_streamed_backward(*addresses, *arguments, *memory, stream)
        return [None if out is None else out.to(dtype) for out, dtype in zip(outs, dtypes, strict=True)]


def _stages(stages: Sequence[Tensor], how: Distillation) -> list[Tensor]:
    """As the kernels take them: dense samples; streamed stages of one compute type, those of moments of one type."""
    dtype = compute_dtype(*stages)
    if how.regime == "streamed":
        stages = [stage if compute_dtype(stage) == dtype else stage.to(dtype) for stage in stages]
    elif how.regime == "feature" and len({stage.dtype for stage in stages}) > 1:
        stages = [stage.to(dtype) for stage in stages]
    return [sample_dense(stage) for stage in stages]


def _arguments(how: Distillation) -> tuple[Sequence[float], int, list[float], float, bool]:
    """The native module's (weights, divergence, parameters, eps, teacher_gradient)."""
    return how.weights, KERNELS[how.divergence], how.parameters, how.eps, how.teacher_gradient


def runs_on(architectures: Sequence[int], major: int, minor: int) -> bool:
    """Whether a device has code among these: of its own generation, or sm_80's PTX, which comes with all from 80 on."""
    capability = 10 * major + minor
    if capability >= 80:
        return max(architectures) >= 80
    return any(architecture // 10 == major and architecture <= capability for architecture in architectures)
