"""A pytest plugin: a GPU's backend takes CPU tensors to the device and its results back.

So the operator's tests, which know CPU tensors, hold it to the same bounds. The CUDA backend goes by the name `cpu`, or
Triton's by its own where ICSD_TEST_BACKENDS says so:
`PYTHONPATH=tests/gpu pytest -p offload tests/ops/test_accuracy.py -k cpu`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from icsd.ops import registry
from icsd.ops.cuda import CUDABackend
from icsd.ops.fused import Distillation, FusedBackend
from icsd.ops.triton import TritonBackend


class Offloading(FusedBackend):
    """Copies around the launches of the next class."""

    device_type = "cpu"
    traced = ()  # copies are not for graphs

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        return FusedBackend.unsupported(self, tensors)

    def launch_gram(self, x: Tensor) -> Tensor:
        return super().launch_gram(_to_gpu(x)).cpu()

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        return super().launch_combine(_to_gpu(matrix), _to_gpu(x)).cpu()

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        loss, saved = super().launch_distill([_to_gpu(stage) for stage in stages], how, save)
        return loss.cpu(), saved.cpu()

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        stages = [_to_gpu(stage) for stage in stages]
        grads = super().launch_distill_backward(_to_gpu(grad), _to_gpu(saved), stages, wanted, how)
        return [None if grad is None else grad.cpu() for grad in grads]


class OffloadingCUDA(Offloading, CUDABackend):
    """The CUDA backend behind copies."""

    name = "cpu"


class OffloadingTriton(Offloading, TritonBackend):
    """The Triton backend behind copies."""


def _to_gpu(x: Tensor) -> Tensor:
    """With the same strides and alignment: a view of a copy of the whole memory that `x` is a view of."""
    memory = x.new_empty(0).set_(x.untyped_storage()).cuda()
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


registry.register(OffloadingTriton() if os.environ.get("ICSD_TEST_BACKENDS") == "triton" else OffloadingCUDA())
