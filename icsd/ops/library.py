"""The operators of `torch.library`: their schemas, the shapes of their results, and how `torch.compile` traces them.

Eager calls on ordinary tensors go straight to a backend's launcher (`icsd.ops.autograd`). All other tensors go through
these operators: the fake ones of a compiler, subclasses, and those with a lazy negation, which the dispatcher resolves.
So do all calls that `make_fx` records. A compiler sees one operator for each call or, where a backend lets it, the
kernels inside.

This is the one file of the operator that uses private API of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from icsd.losses.gram import compute_dtype
from icsd.ops import registry
from icsd.ops.contract import Launcher, Spec, saved_dtype

_ORDINARY = (Tensor, torch.nn.Parameter)

recorder = partial(torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey.PROXY)
"""Returns the mode by which `make_fx` records the operators that are called now, or None."""


def is_ordinary(*tensors: Tensor) -> bool:
    """Return whether a launcher can read these tensors: nothing is traced, and their memory holds their elements.

    The wrappers of `torch.func` are ordinary, too: they reach a launcher without them.
    """
    if torch.compiler.is_dynamo_compiling() or recorder() is not None:
        return False
    for tensor in tensors:  # noqa: SIM110 -- a generator would take twice as long
        if type(tensor) not in _ORDINARY or tensor.is_neg() or tensor._is_zerotensor():
            return False
    return True


def is_transformed(tensors: Sequence[Tensor]) -> bool:
    """Return whether a transform of `torch.func` is at work, or one of the tensors is a dual number of `forward_ad`."""
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


def is_batched(tensor: Tensor) -> bool:
    """Return whether this is a tensor of `torch.func.vmap`, or of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_batchedtensor(tensor) or is_legacy_batched(tensor)


def is_legacy_batched(tensor: Tensor) -> bool:
    """Return whether this is a tensor of `torch.autograd.grad(is_grads_batched=True)`."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def reads(tensors: Sequence[Tensor]) -> bool:
    """Return what `Launcher.reads` does, for launchers without native code."""
    return is_ordinary(*tensors) and not any(
        is_batched(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors
    )


def is_traced(tensor: Tensor) -> bool:
    """Return whether this is a tensor of a graph that `torch.compile` makes of the kernels themselves."""
    return type(tensor) is FunctionalTensor


class Dispatcher:
    """The launcher that calls the operators of this file below autograd.

    Args:
        key: The key of the backend that they run on.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.launcher = self

    def reads(self, _: Sequence[Tensor]) -> bool:
        return False  # nothing is read here, and what autograd does is being traced

    def gram(self, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.gram(x, self.key)

    def combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.combine(matrix, x, self.key)

    def distill(self, inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.icsd.distill(inputs, save, *spec, self.key)

    def distill_backward(
        self, grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]:
        with torch._C._AutoDispatchBelowAutograd():
            grads = iter(torch.ops.icsd.distill_backward(grad, saved, inputs, wanted, *spec, self.key))
        return [next(grads) if want else None for want in wanted]


def launcher_for(backend, *tensors: Tensor) -> Launcher:
    """Return the launcher of a backend or, for tensors that it cannot read, the dispatcher to it."""
    return backend.launcher if is_ordinary(*tensors) else Dispatcher(backend.key)


_SPEC = "str loss, float[] parameters, float[] weights, float eps, bool teacher_gradient, str regime, bool center"
_library = torch.library.Library("icsd", "DEF")
_library.define("gram(Tensor x, str backend) -> Tensor")
_library.define("combine(Tensor matrix, Tensor x, str backend) -> Tensor")
_library.define(f"distill(Tensor[] inputs, bool save, {_SPEC}, str backend) -> (Tensor loss, Tensor saved)")
_library.define(
    f"distill_backward(Tensor grad, Tensor saved, Tensor[] inputs, bool[] wanted, {_SPEC}, str backend) -> Tensor[]"
)


def _backend(key: str):
    return registry.get(key.partition(" ")[0])


def spec_of(arguments: Sequence) -> Spec:
    """Return the spec of the arguments of an operator, whose lists may be those of the dispatcher."""
    loss, parameters, weights, *others = arguments
    return Spec(loss, tuple(parameters), tuple(weights), *others)


def _gram(x, key):
    return _backend(key).launcher.gram(x)


def _combine(matrix, x, key):
    return _backend(key).launcher.combine(matrix, x)


def _distill(inputs, save, *arguments):
    *spec, key = arguments
    return _backend(key).launcher.distill(inputs, spec_of(spec), save)


def _distill_backward(grad, saved, inputs, wanted, *arguments):
    *spec, key = arguments
    grads = _backend(key).launcher.distill_backward(grad, saved, inputs, wanted, spec_of(spec))
    return [grad for grad in grads if grad is not None]


def _traced(launch: Callable) -> Callable:
    """Return the rule by which `torch.compile` traces an operator: its kernels if they can be traced, or the operator.

    Launches are planned for given sizes, so sizes must be static. An exported program keeps the operator, because it
    may run on other devices than the one its launches would be planned for.
    """

    def trace(mode, operator, types, arguments, _):
        *others, key = arguments
        regime = others[-2] if launch in (_distill, _distill_backward) else "sample"
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
        if (
            regime in _backend(key).traced
            and not torch.compiler.is_exporting()
            and all(is_traced(tensor) and _is_static(tensor) for tensor in tensors)
        ):
            with mode:
                return launch(*arguments)
        return mode.__torch_dispatch__(operator, types, arguments)

    return trace


def _is_static(tensor: Tensor) -> bool:
    return all(type(number) is int for number in (*tensor.shape, *tensor.stride()))


for _name, _launch in (
    ("gram", _gram),
    ("combine", _combine),
    ("distill", _distill),
    ("distill_backward", _distill_backward),
):
    _library.impl(_name, _launch, "CPU")
    _library.impl(_name, _launch, "CUDA")
    torch.library.register_torch_dispatch(f"icsd::{_name}", FunctionalTensorMode, _traced(_launch), lib=_library)


def register_autograd(gram: Callable, distill: Callable) -> None:
    """Register the functions that call `gram` and `distill` with autograd."""
    _library.impl("gram", gram, "Autograd")
    _library.impl("distill", distill, "Autograd")


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
def _(inputs, save, *arguments):
    *spec, key = arguments
    spec = spec_of(spec)
    *groups, _, _ = inputs[-1].shape
    saved = _backend(key).saved_shape(inputs, spec) if save else (0,)
    return (
        inputs[-1].new_empty(groups, dtype=compute_dtype(*inputs)),
        inputs[-1].new_empty(saved, dtype=saved_dtype(inputs, spec)),
    )


@torch.library.register_fake("icsd::distill_backward", lib=_library)
def _(grad, saved, inputs, wanted, *_):
    return [x.new_empty(x.shape) for x, want in zip(inputs, wanted, strict=True) if want]
