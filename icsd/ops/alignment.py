"""The loss of centered kernel alignment, `cka`, in few passes over the N x N matrices of every backend.

With u and v, the centered Gram matrices of a student and the teacher divided by their norms, the loss is |u - v|² / 2,
and its gradient with respect to the student's Gram matrix K is ((u - v) - |u - v|² / 2 · u) / |HKH|. The forward pass
makes this matrix in the place of u - v; the backward pass multiplies it with the features, by the kernels of the
backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.losses import CKA, distill_grams
from icsd.losses.base import NOISE
from icsd.losses.gram import compute_dtype, savable
from icsd.ops.autograd import Gram, multiples, wanted_gradients, widened
from icsd.ops.library import Dispatcher, is_batched, is_transformed, launcher_for


class Call(NamedTuple):
    """A call of the loss.

    Attributes:
        backend: The backend whose kernels make the products.
        weights: One weight for each student.
        loss: The loss.
        eps: The least norm of a sample.
        centered: True if the samples have no mean, so that neither have the Gram matrices.
        wanted: True for each stage that gets a gradient.
    """

    backend: object
    weights: Sequence[float]
    loss: CKA
    eps: float
    centered: bool
    wanted: Sequence[bool]


def distill(
    backend, stages: Sequence[Tensor], weights: Sequence[float], loss: CKA, eps: float, centered: bool
) -> Tensor:
    """Return the loss of stages, the last of which is the teacher, `(*B)`; for the other arguments see `Call`."""
    return Alignment.apply(Call(backend, weights, loss, eps, centered, wanted_gradients(stages)), *stages)


class Alignment(torch.autograd.Function):
    """The loss Σ_k w_k (1 - CKA(K_k, K_t)) of stages, the last of which is the teacher: `(*B)`."""

    @staticmethod
    def forward(ctx, call: Call, *stages: Tensor) -> Tensor:
        ctx.call = call
        *wanted, teacher_wanted = call.wanted
        launcher, dtype = launcher_for(call.backend, *stages), compute_dtype(*stages)
        *students, teacher = (_unit(launcher.gram(stage).to(dtype), call.centered) for stage in stages)
        value, grads = 0, []
        of_teacher = torch.zeros_like(teacher.matrix) if teacher_wanted else None
        for weight, student, want in zip(call.weights, students, wanted, strict=True):
            difference = student.matrix - teacher.matrix
            loss, alone = _loss(difference, student, teacher)
            value = value + weight * loss[..., 0, 0]
            if of_teacher is not None:
                grad = difference.neg().addcmul_(teacher.matrix, loss, value=-1)
                of_teacher += grad.mul_(teacher.gradient_factor(weight, alone))
            if want:
                grad = difference.addcmul_(student.matrix, loss, value=-1)
                grads.append(grad.mul_(student.gradient_factor(weight, alone)))
        if any(call.wanted):
            ctx.save_for_backward(*savable(*stages), *grads, *([] if of_teacher is None else [of_teacher]))
        return value

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted, saved = ctx.call.wanted, ctx.saved_tensors
        stages, matrices = saved[: len(wanted)], iter(saved[len(wanted) :])
        creates_graph = torch.is_grad_enabled()
        by_units = is_batched(grad) or (not creates_graph and is_transformed([grad]))
        if creates_graph:
            if not by_units:
                return None, *_differentiable_backward(ctx.call, grad, stages, wanted)
            units = _differentiable_backward(ctx.call, torch.ones_like(stages[0][..., 0, 0]), widened(stages), wanted)
            return None, *multiples(units, grad, stages)
        found = []
        for x, want in zip(stages, wanted, strict=True):
            if not want:
                found.append(None)
                continue
            matrix = next(matrices).to(compute_dtype(x))
            if by_units:
                found.append(Dispatcher(ctx.call.backend.key).combine(matrix, x.to(matrix.dtype)))
            else:
                matrix = (matrix * grad[..., None, None]).to(matrix.dtype)
                found.append(launcher_for(ctx.call.backend, x).combine(matrix, x))
        return None, *(multiples(found, grad, stages) if by_units else found)


class _Unit(NamedTuple):
    """A centered Gram matrix divided by its norm.

    Attributes:
        matrix: The matrix, `(*B, N, N)`; 0 where the norm vanishes.
        inverse: The inverse norm, `(*B, 1, 1)`; 0 where the norm vanishes.
    """

    matrix: Tensor
    inverse: Tensor

    def gradient_factor(self, weight: float, alone: Tensor) -> Tensor:
        """Return what the gradient is multiplied by: twice, as the samples are on both sides of K."""
        return (2 * weight * self.inverse).masked_fill(alone, 0)


def _unit(gram: Tensor, centered: bool) -> _Unit:
    """Center a Gram matrix, unless its samples are centered, and divide it by its norm, both in place."""
    norm = total = _norm(gram)
    if not centered:
        means = gram.mean(-1, keepdim=True)
        gram.sub_(means).sub_(means.mT - means.mean(-2, keepdim=True))
        norm = _norm(gram)
    vanishes = norm <= NOISE * torch.finfo(gram.dtype).eps * total  # False for NaN
    inverse = norm.reciprocal().masked_fill(vanishes, 0).masked_fill(norm.square().isinf(), torch.nan)
    return _Unit(gram.mul_(inverse), inverse)


def _norm(matrix: Tensor) -> Tensor:
    """Return the Frobenius norms of matrices, `(*B, 1, 1)`, row by row: `vector_norm` adds up squares one by one."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=-1, keepdim=True), dim=-2, keepdim=True)


def _loss(difference: Tensor, student: _Unit, teacher: _Unit) -> tuple[Tensor, Tensor]:
    """Return |u - v|² / 2, `(*B, 1, 1)`, or 1 where one of u and v alone vanishes, and where that is so."""
    loss = _norm(difference).square() / 2
    alone = ((student.inverse == 0) != (teacher.inverse == 0)) & ~loss.isnan()
    return loss.masked_fill(alone, 1), alone


def _differentiable_backward(
    call: Call, grad: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients as functions of `grad` and the stages, for `create_graph=True`."""
    stages = [stage.view_as(stage) for stage in stages]  # one input each, though a tensor may be given twice
    value = distill_grams([Gram.apply(call.backend, stage) for stage in stages], call.weights, call.loss, call.eps)
    inputs = [stage for stage, want in zip(stages, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(value, inputs, grad, create_graph=True))
    return [next(grads) if want else None for want in wanted]
