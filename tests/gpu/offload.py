"""A pytest plugin: a GPU's backend copies CPU tensors to the device and its results back.

So the operator's tests, which use CPU tensors, hold it to the same bounds. The CUDA backend goes by the name `cpu`, or
Triton's by its own where ICSD_TEST_BACKENDS says so:
`PYTHONPATH=tests/gpu pytest -p offload tests/ops/test_accuracy.py -k cpu`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from icsd.ops import registry
from icsd.ops.backend import FusedBackend
from icsd.ops.contract import Launcher, Spec
from icsd.ops.cuda import CUDABackend
from icsd.ops.triton import TritonBackend


class OffloadingLauncher:
    """A launcher that copies to a GPU, calls another launcher there and copies its results back."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

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


class Offloading(FusedBackend):
    """A backend of CPU tensors by the launcher of a GPU's backend."""

    device_type = "cpu"

    def __init__(self, backend: FusedBackend, name: str) -> None:
        self.name = name
        self.description = f"{backend.description}, behind copies"
        self.regimes = backend.regimes
        self.launcher = OffloadingLauncher(backend.launcher)
        self.unavailable = backend.unavailable


def _to_gpu(x: Tensor) -> Tensor:
    """With the same strides and alignment: a view of a copy of the whole memory that `x` is a view of."""
    memory = x.new_empty(0).set_(x.untyped_storage()).cuda()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


if os.environ.get("ICSD_TEST_BACKENDS") == "triton":
    registry.register(Offloading(TritonBackend(), "triton"))
else:
    registry.register(Offloading(CUDABackend(), "cpu"))
