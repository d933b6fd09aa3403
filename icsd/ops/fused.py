"""What every compiled backend shares: the `torch.library` operators and their derivatives.

A backend brings four functions on plain tensors (`Launcher`). Two data passes do all the work: the forward reads each
stage once and leaves a small matrix, the backward multiplies it with the stage. Higher derivatives go through `gram`,
which is differentiable any number of times, and plain PyTorch on the N x N matrices.

Eager calls on ordinary tensors go straight to the launcher; under `torch.compile`, fake tensors and functorch the same
code goes through the dispatcher (`torch.ops.icsd.*`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from icsd.ops import registry
from icsd.ops.divergences import DIVERGENCES, Divergence, distill_grams
from icsd.ops.gram import compute_dtype


class Launcher(Protocol):
    """The data passes, without derivatives. Stages are `(*B, N, D_k)`, students first and the teacher last."""

    def launch_gram(self, x: Tensor) -> Tensor:
        """K = X Xᵀ, `(*B, N, N)` in compute dtype."""

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        """`matrix` `(*B, M, N)` in compute dtype times `x` `(*B, N, D)`, in the dtype of `x`."""

    def launch_distill(
        self,
        stages: Sequence[Tensor],
        weights: Sequence[float],
        divergence: str,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss `(*B)` and, if `save`, the slots `(stages, *B, N, N + 1)` of `csrc/cpu/operator.h`."""

    def launch_distill_backward(
        self, grad: Tensor, slots: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor]:
        """The gradients of the stages that are wanted; `grad` is `(*B)`."""


class FusedBackend(registry.Backend, Launcher):
    """A backend by its launcher.

    Attributes:
        divergences: Names of those it has a kernel for.
        device_type: Where its tensors are.
    """

    divergences: frozenset[str]
    device_type: str

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        for tensor in tensors:
            if tensor.device.type != self.device_type:
                return f"it takes {self.device_type} tensors, got {tensor.device.type}"
            if tensor.layout != torch.strided:
                return f"it takes dense tensors, got {tensor.layout}"
        return None

    def gram(self, x: Tensor) -> Tensor:
        if _is_plain(x):
            return _Gram.apply(self, x)
        return torch.ops.icsd.gram(x, self.name)

    def distill(
        self,
        students: Sequence[Tensor],
        teacher: Tensor,
        weights: Sequence[float],
        divergence: Divergence,
        eps: float,
    ) -> Tensor:
        if divergence.name not in self.divergences:
            return distill_grams([self.gram(x) for x in students], self.gram(teacher), weights, divergence, eps)
        stages = [*students, teacher]
        save = torch.is_grad_enabled() and any(stage.requires_grad for stage in stages)
        how = (weights, divergence.name, divergence.parameters(), eps, save and teacher.requires_grad)
        if not _is_plain(*stages):
            return torch.ops.icsd.distill(stages, *how, save, self.name)[0]
        if not save:
            return self.launch_distill(stages, *how, False)[0]
        return _Distill.apply(self, how, *stages)[0]


def _is_plain(*tensors: Tensor) -> bool:
    """Whether these are memory at hand: nothing is being traced or transformed."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and all(type(tensor) is Tensor or type(tensor) is torch.nn.Parameter for tensor in tensors)
    )


class _Dispatched:
    """A backend's launcher by way of the dispatcher, below autograd."""

    def __init__(self, name: str) -> None:
        self.name = name

    def launch_gram(self, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.gram(x, self.name)

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.combine(matrix, x, self.name)

    def launch_distill(self, *arguments) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.distill(*arguments, self.name)

    def launch_distill_backward(self, *arguments) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.distill_backward(*arguments, self.name)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launcher: Launcher, x: Tensor) -> Tensor:
        ctx.launcher = launcher
        ctx.save_for_backward(x)
        return launcher.launch_gram(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        symmetric = grad + grad.mT
        if torch.is_grad_enabled():
            return None, (symmetric @ x.to(symmetric.dtype)).to(x.dtype)
        return None, ctx.launcher.launch_combine(symmetric, x)


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launcher, how, *stages):
        loss, slots = launcher.launch_distill(stages, *how, True)
        ctx.mark_non_differentiable(slots)
        ctx.set_materialize_grads(False)
        ctx.launcher = launcher
        ctx.how = how
        ctx.save_for_backward(slots, *(stages if how[-1] else stages[:-1]))
        return loss, slots

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        slots, *stages = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 : 2 + len(stages)]
        if torch.is_grad_enabled():
            grads = iter(_differentiable_backward(ctx, grad, slots, stages, wanted))
        else:
            grads = iter(ctx.launcher.launch_distill_backward(grad, slots, stages, wanted))
        teacher = () if len(wanted) == len(ctx.needs_input_grad) - 2 else (None,)
        return None, None, *(next(grads) if want else None for want in wanted), *teacher


def _differentiable_backward(ctx, grad: Tensor, slots: Tensor, stages: list[Tensor], wanted) -> Sequence[Tensor]:
    """The same gradients as functions of `grad` and the stages, for `create_graph=True`."""
    weights, divergence, parameters, eps, teacher_gradient = ctx.how
    stages = [stage.view_as(stage) for stage in stages]  # one input each, though a tensor may be given twice
    grams = [_Gram.apply(ctx.launcher, stage) for stage in stages]
    students, teacher = (grams[:-1], grams[-1]) if teacher_gradient else (grams, slots[-1, ..., :-1])
    loss = distill_grams(students, teacher, weights, DIVERGENCES[divergence](*parameters), eps)
    inputs = [stage for stage, want in zip(stages, wanted, strict=True) if want]
    return torch.autograd.grad(loss, inputs, grad, create_graph=True)


_library = torch.library.Library("icsd", "DEF")
_library.define("gram(Tensor x, str backend) -> Tensor")
_library.define("combine(Tensor matrix, Tensor x, str backend) -> Tensor")
_library.define(
    "distill(Tensor[] stages, float[] weights, str divergence, float[] parameters, float eps, bool teacher_gradient, "
    "bool save, str backend) -> (Tensor loss, Tensor slots)"
)
_library.define("distill_backward(Tensor grad, Tensor slots, Tensor[] stages, bool[] wanted, str backend) -> Tensor[]")


def _register_operators() -> None:
    for operator in ("gram", "combine", "distill", "distill_backward"):

        def launch(*arguments, method: str = f"launch_{operator}"):
            *arguments, name = arguments
            return getattr(registry.get(name), method)(*arguments)

        _library.impl(operator, launch, "CPU")
        _library.impl(operator, launch, "CUDA")
    _library.impl("gram", lambda x, name: _Gram.apply(_Dispatched(name), x), "Autograd")
    _library.impl("distill", _distill_autograd, "Autograd")


def _distill_autograd(stages, weights, divergence, parameters, eps, teacher_gradient, save, name):
    launcher = _Dispatched(name)
    if not save:
        return launcher.launch_distill(stages, weights, divergence, parameters, eps, teacher_gradient, save)
    return _Distill.apply(launcher, (weights, divergence, parameters, eps, teacher_gradient), *stages)


@torch.library.register_fake("icsd::gram", lib=_library)
def _(x, backend):
    return x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=compute_dtype(x))


@torch.library.register_fake("icsd::combine", lib=_library)
def _(matrix, x, backend):
    return x.new_empty((*matrix.shape[:-1], x.shape[-1]))


@torch.library.register_fake("icsd::distill", lib=_library)
def _(stages, weights, divergence, parameters, eps, teacher_gradient, save, backend):
    *groups, n, _ = stages[-1].shape
    dtype = compute_dtype(*stages)
    slots = (len(stages), *groups, n, n + 1) if save else (0,)
    return stages[-1].new_empty(groups, dtype=dtype), stages[-1].new_empty(slots, dtype=dtype)


@torch.library.register_fake("icsd::distill_backward", lib=_library)
def _(grad, slots, stages, wanted, backend):
    return [stage.new_empty(stage.shape) for stage, want in zip(stages, wanted, strict=True) if want]


_register_operators()
