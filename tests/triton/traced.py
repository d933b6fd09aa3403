"""Trace graphs of the operator with its Triton kernels in them, without a GPU.

As a script, it writes those of its cases to a file; test_interpreted_memory.py runs them, for interpreted kernels
cannot be traced.
"""

import pickle
import sys
from contextlib import contextmanager
from unittest import mock

import torch
from functorch.compile import aot_function, make_boxed_func
from machine_code import TARGETS, without_gpu
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from triton.runtime import Autotuner

import icsd
from icsd.losses import KL
from icsd.ops.triton import TritonBackend

# Shapes of the stages and the loss.
CASES = [
    ([(5, 700), (5, 900)], KL(0.3)),
    ([(2, 9, 40), (2, 9, 1300), (2, 9, 40)], "mse"),
    ([(130, 20), (130, 24)], "smooth_l1"),
]


def available(_):
    """Return no reason against the backend."""
    return None


@contextmanager
def traceable():
    """Let the backend accept tensors of the CPU, to trace them as if they were on a GPU."""
    with (
        without_gpu(next(target for target in TARGETS if target.arch == 90)),
        mock.patch.object(TritonBackend, "unavailable", available),  # no mock, which torch.compile does not trace
        mock.patch.object(TritonBackend, "device_type", "cpu"),
    ):
        yield


def inputs(shapes):
    """Return the stages of a case."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def loss_of(stages, loss, backend):
    """Return one loss for all groups."""
    options = {"detach_teacher": False, "reduction": "sum", "backend": backend}
    return icsd.interstage_distillation_loss(stages, loss, **options)


def trace(function, *tensors, compiling=aot_function):
    """Return the graphs of the forward and the backward pass of a loss, traced on tensors without data."""
    graphs = []

    def compiler(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = compiling(function, fw_compiler=compiler, bw_compiler=compiler)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        compiled(*map(mode.from_tensor, tensors)).backward()
    return graphs


def launches(graph):
    """Return the nodes of a graph that launch kernels."""
    return [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def launched(graph):
    """Return the names of the kernels in a graph, in their order."""
    return [name_of(kernel_side_table.get_kernel(node.kwargs["kernel_idx"])) for node in launches(graph)]


def name_of(kernel):
    return (kernel.fn if isinstance(kernel, Autotuner) else kernel).__name__


def main(path):
    """Write the code of the graphs, the names of the kernels in them and their constant arguments."""
    codes = []
    with traceable():
        for shapes, loss in CASES:

            def value(*stages, loss=loss):
                return loss_of(stages, loss, "triton")

            codes.append([graph.code for graph in trace(value, *inputs(shapes))])
    names = {number: name_of(kernel) for number, kernel in kernel_side_table.id_to_kernel.items()}
    with open(path, "wb") as file:
        pickle.dump((codes, names, kernel_side_table.constant_args), file)


if __name__ == "__main__":
    main(sys.argv[1])
