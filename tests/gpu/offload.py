"""Backends of a GPU behind copies: they take CPU tensors to the device and their results back.

So the tests that all backends share, which use CPU tensors, hold them to the same bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses import SimilarityLoss
from icsd.ops.backend import FusedBackend
from icsd.ops.contract import BankKernels, Launcher, Spec


class OffloadingLauncher:
    """A launcher that copies to a GPU, calls another launcher there and copies its results back."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.reads = launcher.reads

    def gram(self, x: Tensor) -> Tensor:
        return self.launcher.gram(_to_gpu(x)).cpu()

    def combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        return self.launcher.combine(_to_gpu(matrix), _to_gpu(x)).cpu()

    def distill(self, inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]:
        loss, saved = self.launcher.distill([_to_gpu(x) for x in inputs], spec, save)
        return loss.cpu(), saved.cpu()

    def distill_backward(
        self, grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]:
        inputs = [_to_gpu(x) for x in inputs]
        grads = self.launcher.distill_backward(_to_gpu(grad), _to_gpu(saved), inputs, wanted, spec)
        return [None if grad is None else grad.cpu() for grad in grads]


class OffloadingBanks:
    """Kernels for banks behind such copies."""

    def __init__(self, kernels: BankKernels) -> None:
        self.kernels = kernels
        self.takes = kernels.takes

    def distill(
        self, features: Sequence[Tensor], wanted: Sequence[bool], loss: SimilarityLoss, eps: float
    ) -> tuple[Tensor, list[Tensor]]:
        value, grads = self.kernels.distill([_to_gpu(x) for x in features], wanted, loss, eps)
        return value.cpu(), [grad.cpu() for grad in grads]


class Offloading(FusedBackend):
    """A backend of CPU tensors by the launcher of a GPU's backend."""

    device_type = "cpu"
    has_bank_kernels = True

    name = "offloaded"

    def __init__(self, backend: FusedBackend) -> None:
        self.description = f"{backend.description}, behind copies"
        self.regimes = backend.regimes
        self.launcher = OffloadingLauncher(backend.launcher)
        self.bank_kernels = OffloadingBanks(backend.bank_kernels)
        self.unavailable = backend.unavailable
        self.saved_shape = backend.saved_shape


def _to_gpu(x: Tensor) -> Tensor:
    """Return a copy on the GPU with the same strides and alignment: of the whole memory that `x` is a view of."""
    memory = x.new_empty(0).set_(x.untyped_storage()).cuda()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())
