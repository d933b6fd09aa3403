"""The derivatives of the operator.

In sample space two passes over the data do all the work: the forward pass reads each stage once and leaves a small
matrix, the backward pass multiplies it with the stage. Higher derivatives go through `Gram`, which is differentiable
any number of times, and plain PyTorch on the N x N matrices. Within the transforms of `torch.func` every loss is a
function of `Gram`, whose batching rule makes the mapped dimension one more dimension of groups.

The first argument of each function is the backend, or the `Dispatcher` to it where the call is being traced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from icsd.losses import LOSSES, Loss, distill_grams
from icsd.losses.gram import centered, compute_dtype, gram, no_autocast, savable
from icsd.ops.contract import Spec
from icsd.ops.library import (
    Dispatcher,
    is_batched,
    is_legacy_batched,
    is_transformed,
    launcher_for,
    register_autograd,
    spec_of,
)
from icsd.ops.regimes import feature_space_mse


class Gram(torch.autograd.Function):
    """K = X Xᵀ."""

    @staticmethod
    def forward(backend, x: Tensor) -> Tensor:
        return launcher_for(backend, x).gram(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.backend, x = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        matrix = grad + grad.mT
        if is_legacy_batched(grad):  # no function with derivatives of its own can be mapped over it
            return None, _wide_product(matrix, x).to(x.dtype)
        return None, Combine.apply(ctx.backend, matrix, x)

    @staticmethod
    def jvp(ctx, _, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        half = _wide_product(tangent, x.mT)
        return half + half.mT

    @staticmethod
    def vmap(info, in_dims, backend, x: Tensor) -> tuple[Tensor, int]:
        return Gram.apply(backend, x.movedim(in_dims[1], 0)), 0


class Combine(torch.autograd.Function):
    """The product of a matrix and features."""

    @staticmethod
    def forward(backend, matrix: Tensor, x: Tensor) -> Tensor:
        return launcher_for(backend, matrix, x).combine(matrix, x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, matrix, x = inputs
        ctx.save_for_backward(matrix, x)
        ctx.save_for_forward(matrix, x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        matrix, x = ctx.saved_tensors
        return None, _wide_product(grad, x.mT), _wide_product(matrix.mT, grad).to(x.dtype)

    @staticmethod
    def jvp(ctx, _, matrix_tangent: Tensor, tangent: Tensor) -> Tensor:
        matrix, x = ctx.saved_tensors
        return (_wide_product(matrix_tangent, x) + _wide_product(matrix, tangent)).to(x.dtype)

    @staticmethod
    def vmap(info, in_dims, backend, matrix: Tensor, x: Tensor) -> tuple[Tensor, int]:
        matrix, x = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in ((matrix, in_dims[1]), (x, in_dims[2]))
        )
        return Combine.apply(backend, matrix, x), 0


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return A B in compute dtype, under autocast too."""
    with no_autocast(a):
        dtype = compute_dtype(a, b)
        return a.to(dtype) @ b.to(dtype)


class Distill(torch.autograd.Function):
    """The loss of stages that the launcher of the backend can read."""

    @staticmethod
    def forward(ctx, call: tuple[object, Spec, Loss], *stages: Tensor) -> Tensor:
        ctx.call = backend, spec, _ = call
        value, saved = backend.launcher.distill(stages, spec, True)
        reads_teacher = spec.teacher_gradient or spec.regime != "sample"  # as in spec, without a call
        kept = stages if reads_teacher else stages[:-1]
        if reads_teacher or False in ctx.needs_input_grad[1:-1]:  # constants, which may come from inference mode
            kept = savable(*kept)
        ctx.save_for_backward(saved, *kept)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        backend, spec, _ = ctx.call
        saved, *stages = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[1 : len(stages) + 1]]
        creates_graph = torch.is_grad_enabled()
        if (
            not creates_graph
            and not torch.compiler.is_dynamo_compiling()
            and backend.launcher.reads((grad, saved, *stages))
            and forward_ad.unpack_dual(grad).tangent is None
        ):
            grads = backend.launcher.distill_backward(grad, saved, stages, wanted, spec)
        elif is_batched(grad) or (not creates_graph and is_transformed([grad])):
            wide, ones = widened(stages), torch.ones(stages[0].shape[:-2], dtype=grad.dtype, device=saved.device)
            if creates_graph:
                units = _differentiable_backward(ctx.call, ones, saved, wide, wanted)
            else:
                units = Dispatcher(backend.key).distill_backward(ones, saved, wide, wanted, spec)
            grads = multiples(units, grad, stages)
        elif creates_graph:
            grads = _differentiable_backward(ctx.call, grad, saved, stages, wanted)
        else:
            grads = Dispatcher(backend.key).distill_backward(grad, saved, stages, wanted, spec)
        return None, *grads, None  # for a teacher that was not saved; PyTorch drops one None too many


class DistillOperator(Distill):
    """The same with both results of the operator `icsd::distill`."""

    @staticmethod
    def forward(ctx, call: tuple[object, Spec, Loss], *stages: Tensor) -> tuple[Tensor, Tensor]:
        ctx.call = backend, spec, _ = call
        value, saved = backend.launcher.distill(stages, spec, True)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, *savable(*(stages if spec.reads_teacher else stages[:-1])))
        return value, saved

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        return (None,) * len(ctx.needs_input_grad) if grad is None else Distill.backward(ctx, grad)


def wanted_gradients(tensors: Sequence[Tensor]) -> list[bool]:
    """Return which tensors get a gradient. Within a function, `needs_input_grad` does not know of `torch.no_grad`."""
    return [torch.is_grad_enabled() and x.requires_grad for x in tensors]


def widened(stages: Sequence[Tensor]) -> list[Tensor]:
    """Return the stages in compute dtype, in which no gradient is rounded before it is multiplied."""
    return [x.to(compute_dtype(x)) for x in stages]


def multiples(units: Sequence[Tensor | None], grad: Tensor, stages: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients, which are linear in `grad`, from those for a gradient 1 of the loss."""
    return [
        None if unit is None else (unit * grad[..., None, None]).to(x.dtype)
        for unit, x in zip(units, stages, strict=True)
    ]


def _differentiable_backward(
    call: tuple[object, Spec, Loss], grad: Tensor, saved: Tensor, stages: list[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the same gradients as functions of `grad` and the stages, for `create_graph=True`."""
    backend, spec, loss = call
    stages = [stage.view_as(stage) for stage in stages]  # one input each, though a tensor may be given twice
    if spec.regime == "feature":
        value = feature_space_mse(stages[:-1], stages[-1], spec.weights, spec.eps)
    else:
        grams = [Gram.apply(backend, centered(stage) if spec.center else stage) for stage in stages]
        if not spec.reads_teacher:
            grams.append(saved[-1, ..., : saved.shape[-2]])
        value = distill_grams(grams, spec.weights, loss, spec.eps)
    inputs = [stage for stage, want in zip(stages, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(value, inputs, grad, create_graph=True))
    return [next(grads) if want else None for want in wanted]


def _gram_with_autograd(x, key):
    if is_transformed([x]):  # traced by torch.compile, which cannot trace the batching rule of a function
        return gram(x)
    return Gram.apply(Dispatcher(key), x)


def _distill_with_autograd(stages, save, *arguments):
    *spec, key = arguments
    spec, dispatcher = spec_of(spec), Dispatcher(key)
    if not save:
        return dispatcher.distill(stages, spec, save)
    loss = LOSSES[spec.loss].from_kernel_parameters(spec.parameters)
    return DistillOperator.apply((dispatcher, spec, loss), *stages)


register_autograd(_gram_with_autograd, _distill_with_autograd)
