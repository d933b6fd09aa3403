"""What every compiled backend shares: the `torch.library` operators and their derivatives.

A backend brings four functions on plain tensors (`Launcher`), and says which regimes (`icsd.ops.regimes`) it has for
which losses. In sample space two data passes do all the work: the forward reads each stage once and leaves a small
matrix, the backward multiplies it with the stage. Higher derivatives go through `gram`, which is differentiable any
number of times, and plain PyTorch on the N x N matrices.

Eager calls on ordinary tensors go straight to the launcher; under `torch.compile` and on fake tensors the same code
goes through the dispatcher (`torch.ops.icsd.*`). A compiler sees one operator there or, where a backend lets it trace
them, the launches inside. Within the transforms of `torch.func` every loss is a function of `gram`, whose batching rule
takes the mapped dimension for one more of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils._pytree import tree_leaves

from icsd.losses import LOSSES, Loss, distill_grams
from icsd.losses.gram import compute_dtype, gram, no_autocast
from icsd.ops import registry
from icsd.ops.regimes import Regime, choose_regime, feature_space_mse

MAX_STATISTICS = 5  # csrc/core/losses.h


class Distillation(NamedTuple):
    """What a launcher is asked for.

    Attributes:
        weights: One for each student.
        loss: Its name.
        parameters: Its parameters, in the order of its kernel (`Loss.kernel_parameters`).
        eps: Least norm.
        teacher_gradient: Whether the backward pass may ask for the teacher's gradient.
        regime: How to compute it.
    """

    weights: Sequence[float]
    loss: str
    parameters: list[float]
    eps: float
    teacher_gradient: bool
    regime: Regime

    @property
    def backward_reads_teacher(self) -> bool:
        """Whether the backward pass needs the teacher's features: they then stay alive until it."""
        return self.teacher_gradient or self.regime != "sample"


class Launcher(Protocol):
    """The data passes, without derivatives. Stages are `(*B, N, D_k)`, students first and the teacher last."""

    def launch_gram(self, x: Tensor) -> Tensor:
        """K = X Xᵀ, `(*B, N, N)` in compute dtype."""

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        """`matrix` `(*B, M, N)` in compute dtype times `x` `(*B, N, D)`, in the dtype of `x`."""

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        """The loss `(*B)` and, if `save`, what the backward pass needs, of `saved_shape` and `saved_dtype`."""

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        """The gradients of the stages, None for those that are not wanted; `grad` is `(*B)`.

        The teacher is among the stages if `how.backward_reads_teacher`, and may be wanted if `how.teacher_gradient`.
        """


def sample_dense(x: Tensor) -> Tensor:
    """`x` itself if each sample's features are adjacent and one stride leads from group to group; a copy otherwise."""
    if x.dim() > 3:
        x = x.flatten(0, -3).unflatten(0, x.shape[:-2]) if x.numel() else x
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def saved_shape(stages: Sequence[Tensor], how: Distillation) -> tuple[int, ...]:
    """The shape of what `launch_distill` saves.

    * `sample`: the slots `(stages, *B, N, N + 1)` of csrc/cpu/operator.h.
    * `feature`: the moments `(*B, E)` of csrc/core/moments.h: of every student X̂ᵀX̂ and X̂ᵀŶ, then of the teacher ŶᵀŶ.
    * `streamed`: `(*B, E)` as in csrc/cpu/streamed.h: the squared norms of all stages' samples, then of every student
      `MAX_STATISTICS` numbers of each row.
    """
    *groups, n, width = stages[-1].shape
    students = stages[:-1]
    if how.regime == "feature":
        moments = sum(student.shape[-1] * (student.shape[-1] + width) for student in students)
        return (*groups, moments + width * width)
    if how.regime == "streamed":
        return (*groups, n * (len(stages) + MAX_STATISTICS * len(students)))
    return (len(stages), *groups, n, n + 1)


def saved_dtype(stages: Sequence[Tensor], how: Distillation) -> torch.dtype:
    """The dtype of what `launch_distill` saves: moments over many samples are sums in float64."""
    return torch.float64 if how.regime == "feature" else compute_dtype(*stages)


class FusedBackend(registry.Backend, Launcher):
    """A backend by its launcher.

    Attributes:
        regimes: Those it has for each loss it has a kernel for, by name; `"sample"` is always among them.
        device_type: Where its tensors are.
        traced: The regimes whose launches `torch.compile` can trace: of operations that it knows.
    """

    regimes: Mapping[str, Collection[Regime]]
    device_type: str
    traced: Collection[Regime] = ()

    @property
    def key(self) -> str:
        """What operators call it: its name, then whatever else decides what is traced, for compilers cache by it."""
        return self.name

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        here = f"is_{self.device_type}"
        for tensor in tensors:
            if not getattr(tensor, here):
                return f"it takes {self.device_type} tensors, got {tensor.device.type}"
            if tensor.layout != torch.strided:
                return f"it takes dense tensors, got {tensor.layout}"
        return None

    def gram(self, x: Tensor) -> Tensor:
        if _is_plain(x):
            return _Gram.apply(self, x)
        return torch.ops.icsd.gram(x, self.key)

    def distill(self, stages: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float) -> Tensor:
        parameters = loss.kernel_parameters()
        if loss.name not in self.regimes or parameters is None or torch._C._are_functorch_transforms_active():
            return distill_grams([self.gram(stage) for stage in stages], weights, loss, eps)
        *groups, n, _ = stages[-1].shape
        regime = choose_regime(
            self.regimes[loss.name],
            math.prod(groups),
            n,
            [stage.shape[-1] for stage in stages],
            compute_dtype(*stages).itemsize,
        )
        wanted = [stage.requires_grad for stage in stages]
        save = True in wanted and torch.is_grad_enabled()
        how = Distillation(weights, loss.name, parameters, eps, save and wanted[-1], regime)
        if not _is_plain(*stages):
            return torch.ops.icsd.distill(stages, save, *how, self.key)[0]
        if not save:
            return self.launch_distill(stages, how, False)[0]
        return _Distill.apply(self, how, *stages)[0]


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_plain(*tensors: Tensor) -> bool:
    """Whether these are memory at hand, or `torch.func`'s wrappers of it: nothing is being traced."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return False
    return not torch.compiler.is_compiling()


class _Dispatched:
    """A backend's launcher by way of the dispatcher, below autograd."""

    def __init__(self, key: str) -> None:
        self.key = key

    def launch_gram(self, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.gram(x, self.key)

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.combine(matrix, x, self.key)

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.distill(stages, save, *how, self.key)

    def launch_distill_backward(self, grad, saved, stages, wanted, how: Distillation) -> list[Tensor | None]:
        with torch._C._AutoDispatchBelowAutograd():
            grads = iter(torch.ops.icsd.distill_backward(grad, saved, stages, wanted, *how, self.key))
        return [next(grads) if want else None for want in wanted]


def _is_batched(tensor: Tensor) -> bool:
    """Whether this is `torch.func.vmap`'s, or the one of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(launcher: Launcher, x: Tensor) -> Tensor:
        return launcher.launch_gram(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.launcher, x = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return None, _Combine.apply(ctx.launcher, grad + grad.mT, x)

    @staticmethod
    def jvp(ctx, _, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        half = _wide_product(tangent, x.mT)
        return half + half.mT

    @staticmethod
    def vmap(info, in_dims, launcher: Launcher, x: Tensor) -> tuple[Tensor, int]:
        return _Gram.apply(launcher, x.movedim(in_dims[1], 0)), 0


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(launcher: Launcher, matrix: Tensor, x: Tensor) -> Tensor:
        return launcher.launch_combine(matrix, x)

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
    def vmap(info, in_dims, launcher: Launcher, matrix: Tensor, x: Tensor) -> tuple[Tensor, int]:
        matrix, x = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in ((matrix, in_dims[1]), (x, in_dims[2]))
        )
        return _Combine.apply(launcher, matrix, x), 0


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """A B in compute dtype, under autocast too."""
    with no_autocast(a):
        dtype = compute_dtype(a, b)
        return a.to(dtype) @ b.to(dtype)


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launcher: Launcher, how: Distillation, *stages: Tensor):
        loss, saved = launcher.launch_distill(stages, how, True)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.launcher = launcher
        ctx.how = how
        ctx.save_for_backward(saved, *(stages if how.backward_reads_teacher else stages[:-1]))
        return loss, saved

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, *stages = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2 : 2 + len(stages)]
        if _is_batched(grad):  # many at once, in which the gradient is linear
            ones = torch.ones(stages[0].shape[:-2], dtype=grad.dtype, device=saved.device)
            units = ctx.launcher.launch_distill_backward(ones, saved, stages, wanted, ctx.how)
            grads = [None if unit is None else unit * grad[..., None, None] for unit in units]
        elif torch.is_grad_enabled():
            grads = _differentiable_backward(ctx.launcher, grad, saved, stages, wanted, ctx.how)
        else:
            grads = ctx.launcher.launch_distill_backward(grad, saved, stages, wanted, ctx.how)
        return (None, None, *grads) if ctx.how.backward_reads_teacher else (None, None, *grads, None)


def _differentiable_backward(
    launcher: Launcher, grad: Tensor, saved: Tensor, stages: list[Tensor], wanted: Sequence[bool], how: Distillation
) -> list[Tensor | None]:
    """The same gradients as functions of `grad` and the stages, for `create_graph=True`."""
    stages = [stage.view_as(stage) for stage in stages]  # one input each, though a tensor may be given twice
    if how.regime == "feature":
        value = feature_space_mse(stages[:-1], stages[-1], how.weights, how.eps)
    else:
        grams = [_Gram.apply(launcher, stage) for stage in stages]
        if not how.backward_reads_teacher:
            grams.append(saved[-1, ..., :-1])
        loss = LOSSES[how.loss].from_kernel_parameters(how.parameters)
        value = distill_grams(grams, how.weights, loss, how.eps)
    inputs = [stage for stage, want in zip(stages, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(value, inputs, grad, create_graph=True))
    return [next(grads) if want else None for want in wanted]


_HOW = "float[] weights, str loss, float[] parameters, float eps, bool teacher_gradient, str regime"
_library = torch.library.Library("icsd", "DEF")
_library.define("gram(Tensor x, str backend) -> Tensor")
_library.define("combine(Tensor matrix, Tensor x, str backend) -> Tensor")
_library.define(f"distill(Tensor[] stages, bool save, {_HOW}, str backend) -> (Tensor loss, Tensor saved)")
_library.define(
    f"distill_backward(Tensor grad, Tensor saved, Tensor[] stages, bool[] wanted, {_HOW}, str backend) -> Tensor[]"
)


def _backend(key: str) -> FusedBackend:
    return registry.get(key.partition(" ")[0])


def _register_operators() -> None:
    def launch_distill(stages, save, *arguments):
        *how, key = arguments
        return _backend(key).launch_distill(stages, Distillation(*how), save)

    def launch_distill_backward(grad, saved, stages, wanted, *arguments):
        *how, key = arguments
        grads = _backend(key).launch_distill_backward(grad, saved, stages, wanted, Distillation(*how))
        return [grad for grad in grads if grad is not None]

    launches = {
        "gram": lambda x, key: _backend(key).launch_gram(x),
        "combine": lambda matrix, x, key: _backend(key).launch_combine(matrix, x),
        "distill": launch_distill,
        "distill_backward": launch_distill_backward,
    }
    for operator, launch in launches.items():
        _library.impl(operator, launch, "CPU")
        _library.impl(operator, launch, "CUDA")
        torch.library.register_torch_dispatch(f"icsd::{operator}", FunctionalTensorMode, _traced(launch), lib=_library)
    _library.impl("gram", _gram_autograd, "Autograd")
    _library.impl("distill", _distill_autograd, "Autograd")


def _traced(launch: Callable) -> Callable:
    """What `torch.compile` traces of an operator: its launches or, where they cannot be traced, the operator itself.

    Launches are planned for given sizes; an exported program is to run where its launches were not planned.
    """

    def trace(mode, operator, types, arguments, _):
        *_, regime, key = arguments
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if (
            (regime if isinstance(regime, str) else "sample") in _backend(key).traced
            and not torch.compiler.is_exporting()
            and all(type(tensor) is FunctionalTensor and _is_static(tensor) for tensor in tensors)
        ):
            with mode:
                return launch(*arguments)
        return mode.__torch_dispatch__(operator, types, arguments)

    return trace


def _is_static(tensor: Tensor) -> bool:
    return all(type(number) is int for number in (*tensor.shape, *tensor.stride()))


def _gram_autograd(x, key):
    if torch._C._are_functorch_transforms_active():  # traced by torch.compile, of whose functions no vmap is a loop
        return gram(x)
    return _Gram.apply(_Dispatched(key), x)


def _distill_autograd(stages, save, *arguments):
    *how, key = arguments
    launcher, how = _Dispatched(key), Distillation(*how)
    if not save:
        return launcher.launch_distill(stages, how, save)
    return _Distill.apply(launcher, how, *stages)


@torch.library.register_vmap("icsd::gram", lib=_library)
def _(info, in_dims, x, backend):
    return torch.ops.icsd.gram(x.movedim(in_dims[0], 0), backend), 0


@torch.library.register_fake("icsd::gram", lib=_library)
def _(x, backend):
    return x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=compute_dtype(x))


@torch.library.register_fake("icsd::combine", lib=_library)
def _(matrix, x, backend):
    return x.new_empty((*matrix.shape[:-1], x.shape[-1]))


@torch.library.register_fake("icsd::distill", lib=_library)
def _(stages, save, *arguments):
    *how, _ = arguments
    dtype = compute_dtype(*stages)
    how = Distillation(*how)
    saved = saved_shape(stages, how) if save else (0,)
    return (
        stages[-1].new_empty(stages[-1].shape[:-2], dtype=dtype),
        stages[-1].new_empty(saved, dtype=saved_dtype(stages, how)),
    )


@torch.library.register_fake("icsd::distill_backward", lib=_library)
def _(grad, saved, stages, wanted, *_):
    return [stage.new_empty(stage.shape) for stage, want in zip(stages, wanted, strict=True) if want]


_register_operators()
