"""Gram matrices and similarities in plain PyTorch. All losses are functions of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# The types of devices with autocast. `torch.compile` cannot ask PyTorch for them in all versions.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia") if torch.amp.is_autocast_available(device)
)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which tensors are accumulated: float64 if one of them is float64, float32 otherwise."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def gram(x: Tensor) -> Tensor:
    """Return K = X Xᵀ, `(*B, N, N)` in compute dtype, of `(*B, N, D)`, under autocast too."""
    with no_autocast(x):
        x = x.to(compute_dtype(x))
        return x @ x.mT


def centered(x: Tensor) -> Tensor:
    """Return the samples minus the mean of their group, `(*B, N, D)` in compute dtype.

    The first sample is subtracted before the mean is taken. So the rounding error is relative to the differences of the
    samples, however large their mean is, and equal samples become exact zeros.
    """
    x = x.to(compute_dtype(x))
    x = x - x[..., :1, :].detach()  # the result does not depend on it
    return x - x.mean(-2, keepdim=True)


def savable(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors as autograd can save them: copies of those that were made under `torch.inference_mode`."""
    if torch.compiler.is_compiling():  # which cannot ask for it
        return [*tensors]
    return [x.clone() if x.is_inference() else x for x in tensors]


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which `torch.autocast` does not change the dtype of products."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in _AUTOCAST else nullcontext()


def similarity_from_gram(gram: Tensor, eps: float) -> Tensor:
    """Return S_ij = K_ij / (n_i n_j) with n_i = max(sqrt(K_ii), eps).

    A zero row has similarity 0 and gradient 0. A row whose squared norm is not finite is NaN.
    """
    inverse = inverse_norms(diagonal(gram), eps)
    return gram * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))


def diagonal(matrix: Tensor) -> Tensor:
    """Return the diagonals of `(*B, N, N)`, `(*B, N)`."""
    if not torch.compiler.is_compiling():
        return matrix.diagonal(dim1=-2, dim2=-1)
    # Inductor of PyTorch 2.10 and 2.11 reuses the memory of the matrix in the backward pass while a view of it is read.
    others = ~torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device)
    return matrix.masked_fill(others, 0).sum(-1)


def inverse_norms(square: Tensor, eps: float) -> Tensor:
    """Return 1 / max(n, eps) of squared norms n², or 0 for zero samples."""
    zero = square == 0
    return _inverse(square.masked_fill(zero, 1).sqrt(), zero, eps)


def similarity_to(x: Tensor, other: Tensor, eps: float) -> Tensor:
    """Return the similarities of two batches, `(*B, N, D)` and `(*B, M, D)`: `(*B, N, M)` in compute dtype."""
    with no_autocast(x):
        dtype = compute_dtype(x, other)
        x, other = x.to(dtype), other.to(dtype)
        if torch.is_grad_enabled():
            x, other = savable(x, other)
        rows, columns = (inverse_norms(z.square().sum(-1), eps) for z in (x, other))
        return (x @ other.mT) * (rows.unsqueeze(-1) * columns.unsqueeze(-2))


def unit_samples(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / max(n, eps) of samples of norm n, and 1 / max(n, eps), `(*B, N, 1)`: both are 0 for zero samples."""
    inverse = inverse_of_norms(x.norm(dim=-1, keepdim=True), eps)
    return x * inverse, inverse


def inverse_of_norms(norm: Tensor, eps: float) -> Tensor:
    """Return 1 / max(n, eps) of norms n, or 0 for zero samples."""
    return _inverse(norm, norm == 0, eps)


def _inverse(norm: Tensor, zero: Tensor, eps: float) -> Tensor:
    """Return 1 / max(n, eps), 0 where the sample is 0, and NaN where n is infinite."""
    return norm.clamp(min=eps).reciprocal().masked_fill(zero, 0).masked_fill(norm.isinf(), torch.nan)
