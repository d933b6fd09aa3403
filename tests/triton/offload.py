"""A pytest plugin: the Triton backend takes CPU tensors to the GPU and its results back, for tests that know no GPU."""

from torch import Tensor

from icsd.ops import registry
from icsd.ops.triton import TritonBackend


class OffloadingBackend(TritonBackend):
    """The Triton backend behind copies."""

    device_type = "cpu"

    def launch_gram(self, x):
        return super().launch_gram(on_gpu(x)).cpu()

    def launch_combine(self, matrix, x):
        return super().launch_combine(on_gpu(matrix), on_gpu(x)).cpu()

    def launch_distill(self, stages, how, save):
        loss, saved = super().launch_distill([on_gpu(stage) for stage in stages], how, save)
        return loss.cpu(), saved.cpu()

    def launch_distill_backward(self, grad, saved, stages, wanted, how):
        stages = [on_gpu(stage) for stage in stages]
        return [x.cpu() for x in super().launch_distill_backward(on_gpu(grad), on_gpu(saved), stages, wanted, how)]


def on_gpu(x: Tensor) -> Tensor:
    """With the strides and the alignment it has: a view of a copy of all the memory it is a view of."""
    return x.new_empty(0).set_(x.untyped_storage()).cuda().as_strided(x.shape, x.stride(), x.storage_offset())


registry.register(OffloadingBackend())
