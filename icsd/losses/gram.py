"""Gram matrices and similarities in plain PyTorch: what every loss of the operator is a function of."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What these are accumulated in: float64 if one of them is, float32 otherwise."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def gram(x: Tensor) -> Tensor:
    """K = X Xᵀ, `(*B, N, D)` to `(*B, N, N)`, in compute dtype, under autocast too."""
    with no_autocast(x):
        x = x.to(compute_dtype(x))
        return x @ x.mT


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Where products are in the dtype of their factors, whatever the caller's `torch.autocast`."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def similarity_from_gram(gram: Tensor, eps: float) -> Tensor:
    """S_ij = K_ij / (n_i n_j) with n_i = max(sqrt(K_ii), eps); a zero row has similarity 0 and passes no gradient.

    A row whose squared norm is not finite is NaN.
    """
    inverse = inverse_norms(gram.diagonal(dim1=-2, dim2=-1), eps)
    return gram * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))


def inverse_norms(square: Tensor, eps: float) -> Tensor:
    """1 / max(n, eps) of squared norms n², as similarities take it."""
    zero = square == 0
    return _inverse(square.masked_fill(zero, 1).sqrt(), zero, eps)


def similarity_to(x: Tensor, other: Tensor, eps: float) -> Tensor:
    """The same of the samples of two batches, `(*B, N, D)` and `(*B, M, D)`: `(*B, N, M)` in compute dtype."""
    with no_autocast(x):
        dtype = compute_dtype(x, other)
        x, other = x.to(dtype), other.to(dtype)
        rows, columns = (_inverse(norm, norm == 0, eps) for norm in (x.norm(dim=-1), other.norm(dim=-1)))
        return (x @ other.mT) * (rows.unsqueeze(-1) * columns.unsqueeze(-2))


def _inverse(norm: Tensor, zero: Tensor, eps: float) -> Tensor:
    """1 / max(n, eps), 0 where the sample is, and NaN where n is infinite."""
    return norm.clamp(min=eps).reciprocal().masked_fill(zero, 0).masked_fill(norm.isinf(), torch.nan)
