"""The compiled CUDA backend: the functions of `icsd._native.cuda`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from icsd.losses import SimilarityLoss
from icsd.losses.gram import compute_dtype
from icsd.ops import cpu
from icsd.ops.backend import FusedBackend
from icsd.ops.contract import Spec, sample_dense, saved_shape, unit_dtype
from icsd.ops.cpu import NativeLauncher, native_regimes

SQUARE_SPLITS = 64  # of csrc/cuda/operator.h


class CUDALauncher(NativeLauncher):
    """The CUDA functions, which take some inputs in one dtype only."""

    def distill(self, inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]:
        return super().distill(_same_dtype(inputs, spec), spec, save)

    def distill_backward(
        self, grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]:
        grads = super().distill_backward(grad, saved, _same_dtype(inputs, spec), wanted, spec)
        return [None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True)]


class CUDABankKernels:
    """The CUDA functions for similarities to banks. They take features of one dtype: others are converted.

    Args:
        launcher: The other functions.
    """

    def __init__(self, launcher: CUDALauncher) -> None:
        self.launcher = launcher

    def takes(self, features: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
        """Return True: there are kernels for all sizes."""
        return True

    def distill(
        self, features: Sequence[Tensor], wanted: Sequence[bool], loss: SimilarityLoss, eps: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss `(*B)` and its gradients with respect to the features that are wanted."""
        inputs = features
        if len({x.dtype for x in features}) > 1 or (
            True in wanted and features[0].dtype is not unit_dtype(features[0])
        ):
            dtype = compute_dtype(*features)
            inputs = [x.to(dtype) for x in features]
        inputs = [x if x.is_contiguous() else sample_dense(x) for x in inputs]
        spec = self.launcher.spec(loss.name, loss.kernel_parameters(), (1.0,), eps, False, "streamed")
        value, grads = self.launcher.module.distill_to_banks(inputs, wanted, spec)
        return value, [grad.to(unit_dtype(x)) for x, grad in zip(features, grads, strict=True) if grad is not None]


class CUDABackend(FusedBackend):
    """CUDA C++ on the current stream of the tensors' device, with memory of PyTorch's allocator."""

    name = "cuda"
    description = "fused CUDA kernels"
    device_type = "cuda"
    centers = True
    has_bank_kernels = True
    bank_order = 1

    def __init__(self) -> None:
        self.regimes = native_regimes()
        if hasattr(cpu._native, "cuda"):
            self.launcher = CUDALauncher(cpu._native.cuda, cpu._native.Spec)

    @cached_property
    def bank_kernels(self) -> CUDABankKernels:
        return CUDABankKernels(self.launcher)

    def saved_shape(self, inputs: Sequence[Tensor], spec: Spec) -> tuple[int, ...]:
        """Return the shape of what is saved: rows are padded, feature space saves more; see csrc/cuda/operator.h."""
        *shape, last = saved_shape(inputs, spec)
        samples = inputs[-1].shape[-2]
        if spec.regime == "feature":
            return (*shape, last + (2 * len(inputs) - 1) * SQUARE_SPLITS + len(inputs) * samples)
        return (*shape, (samples // 4 + 1) * 4) if spec.regime == "sample" else (*shape, last)

    @cached_property
    def architectures(self) -> list[int]:
        """Compute capabilities with machine code, e.g. 80."""
        return [int(architecture) for architecture in cpu._native.build["cuda"].split()]

    def unavailable(self) -> str | None:
        """Return which of build, torch and device is missing, if one is."""
        if cpu._native is None:
            return cpu.CPUBackend().unavailable()
        if not hasattr(cpu._native, "cuda"):
            return (
                "the native module was built without CUDA; put nvcc on PATH (or set CUDA_HOME), run: pip install -e ."
            )
        built = "built for " + ", ".join(f"sm_{architecture}" for architecture in self.architectures)
        if torch.version.cuda is None:
            return f"{built}, but this torch ({torch.__version__}) was built without CUDA; install one with CUDA"
        # The native module has a CUDA runtime of its own, which may need a newer driver than torch's.
        count, error = cpu._native.cuda.devices()
        if not count:
            return f"{built}, no GPU that it can use here ({error})"
        if not torch.cuda.is_available():
            return f"{built}, but this torch ({torch.__version__}) finds no GPU that it can use"
        self.ready = True
        return None

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        return super().unsupported(tensors) or capture_unsupported() or self.device_unsupported(tensors[0].device)

    @cache  # noqa: B019 - there is one backend, and few devices
    def device_unsupported(self, device: torch.device) -> str | None:
        """Return why the build has no code for a device, if it has none."""
        major, minor = torch.cuda.get_device_capability(device)
        if runs_on(self.architectures, major, minor):
            return None
        built = ", ".join(f"sm_{architecture}" for architecture in self.architectures)
        needed = f"{major}{minor}"
        if 10 * major + minor < LEAST_ARCHITECTURE:
            return f"the device is sm_{needed}, and the kernels need sm_{LEAST_ARCHITECTURE} or newer"
        return f"it is built for {built}, the device is sm_{needed}; rebuild with ICSD_CUDA_ARCHITECTURES={needed}"


LEAST_ARCHITECTURE = 75
"""The oldest architecture that setup.py builds for."""

# PyTorch reads this variable once, too.
_uncached = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ


def capture_unsupported() -> str | None:
    """Return why results cannot be allocated now, if a CUDA graph is being captured that cannot hold allocations."""
    if _uncached and torch.cuda.is_current_stream_capturing():
        return (
            "a CUDA graph is being captured, which cannot hold allocations of its own: unset "
            "PYTORCH_NO_CUDA_MEMORY_CACHING, or allocate nothing while capturing"
        )
    return None


def _same_dtype(inputs: Sequence[Tensor], spec: Spec) -> Sequence[Tensor]:
    """Convert the inputs to what their regime takes: `streamed` one compute type, `feature` one type."""
    if spec.regime == "sample" or len({x.dtype for x in inputs}) == 1:
        return inputs
    dtype = compute_dtype(*inputs)
    if spec.regime == "feature":
        return [x.to(dtype) for x in inputs]
    return [x if compute_dtype(x) == dtype else x.to(dtype) for x in inputs]


def runs_on(architectures: Sequence[int], major: int, minor: int) -> bool:
    """Tell whether a build for these architectures runs on a device.

    It does with machine code for the device's generation, or with the PTX of an older one: a build for several from 80
    on has that of sm_80, a build for one has its own.
    """
    capability = 10 * major + minor
    if capability >= 80:
        new = [architecture for architecture in architectures if architecture >= 80]
        return bool(new) and capability >= (80 if len(new) > 1 else new[0])
    return any(architecture // 10 == major and architecture <= capability for architecture in architectures)
