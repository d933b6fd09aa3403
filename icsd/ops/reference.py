"""The operator in plain PyTorch: the definition that every other backend is held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icsd.ops.divergences import Divergence
from icsd.ops.registry import Backend


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What these are accumulated in: float64 if one of them is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def gram(x: Tensor) -> Tensor:
    """K = X Xᵀ, `(*B, N, D)` to `(*B, N, N)`, in compute dtype, under autocast too."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(compute_dtype(x))
        return x @ x.mT


def similarity_from_gram(gram: Tensor, eps: float) -> Tensor:
    """S_ij = K_ij / (n_i n_j) with n_i = max(sqrt(K_ii), eps); a zero row has similarity 0 and passes no gradient.

    A row whose squared norm is not finite is NaN.
    """
    square = gram.diagonal(dim1=-2, dim2=-1)
    zero = square == 0
    norm = square.masked_fill(zero, 1).sqrt().clamp(min=eps)
    inverse = norm.reciprocal().masked_fill(zero, 0).masked_fill(square.isinf(), torch.nan)
    return gram * (inverse.unsqueeze(-1) * inverse.unsqueeze(-2))


def distill(
    students: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], divergence: Divergence, eps: float
) -> Tensor:
    """Σ_k w_k d(S(X_k), S(Y)) of every group: `(*B)`."""
    return distill_grams([gram(student) for student in students], gram(teacher), weights, divergence, eps)


def distill_grams(
    students: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], divergence: Divergence, eps: float
) -> Tensor:
    """`distill` from Gram matrices `(*B, N, N)`."""
    dtype = compute_dtype(teacher, *students)
    target = similarity_from_gram(teacher.to(dtype), eps)
    losses = [
        weight * divergence.forward(similarity_from_gram(student.to(dtype), eps), target)
        for weight, student in zip(weights, students, strict=True)
    ]
    return torch.stack(losses).sum(0)


class ReferenceBackend(Backend):
    """This module as a backend."""

    name = "reference"
    description = "plain PyTorch, the definition: any device, double backward by autograd"

    def unavailable(self) -> None:
        """It always runs."""

    def unsupported(self, tensors: Sequence[Tensor], divergence: Divergence | None) -> None:
        """It takes everything."""

    def gram(self, x: Tensor) -> Tensor:
        return gram(x)

    def distill(
        self,
        students: Sequence[Tensor],
        teacher: Tensor,
        weights: Sequence[float],
        divergence: Divergence,
        eps: float,
    ) -> Tensor:
        return distill(students, teacher, weights, divergence, eps)
