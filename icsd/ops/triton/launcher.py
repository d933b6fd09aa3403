"""The functions of `icsd.ops.contract.Launcher` by Triton kernels. Importing this module imports triton."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.contract import Spec, saved_dtype, saved_shape
from icsd.ops.library import reads
from icsd.ops.triton import feature, kernels, sample, streamed
from icsd.ops.triton.runtime import as_groups

__all__ = ["combine", "distill", "distill_backward", "gram", "reads"]

REGIMES = {"sample": sample, "feature": feature, "streamed": streamed}


def gram(x: Tensor) -> Tensor:
    """Return K = X Xᵀ, `(*B, N, N)` in compute dtype."""
    out = x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=compute_dtype(x))
    kernels.gram.gram(as_groups(x), as_groups(out))
    return out


def combine(matrix: Tensor, x: Tensor) -> Tensor:
    """Return `matrix` `(*B, M, N)` times `x` `(*B, N, D)`, in the dtype of `x`."""
    out = x.new_empty((*matrix.shape[:-1], x.shape[-1]))
    kernels.combine.combine(as_groups(matrix), as_groups(x), as_groups(out))
    return out


def distill(inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]:
    """Return the loss `(*B)` and, if `save`, what the backward pass needs."""
    saved = inputs[-1].new_empty(saved_shape(inputs, spec) if save else 0, dtype=saved_dtype(inputs, spec))
    stages = [as_groups(x) for x in inputs]
    loss = REGIMES[spec.regime].distill(stages, spec, saved if save else None)
    return loss.view(inputs[-1].shape[:-2]), saved


def distill_backward(
    grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
) -> list[Tensor | None]:
    """Return the gradients of the inputs, None for those that are not wanted."""
    grads = [x.new_empty(x.shape) if want else None for x, want in zip(inputs, wanted, strict=True)]
    outs = [None if grad is None else as_groups(grad) for grad in grads]
    stages = [as_groups(x) for x in inputs]
    REGIMES[spec.regime].distill_backward(grad.reshape(-1).contiguous(), saved.contiguous(), stages, outs, spec)
    return grads
