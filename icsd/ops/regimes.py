"""The three ways to compute a distillation loss, and the choice between them by cost.

* `sample`: the N x N matrices are made and kept; cost N² D, memory N². This is a GAN's case: few samples, large D.
* `feature`: `mse` from the D x D matrices, |S - T|² = |X̂ᵀX̂|² - 2|X̂ᵀŶ|² + |ŶᵀŶ|²; cost N D², memory D². `cka`, too,
  where the N x N matrices would take too much memory.
* `streamed`: tiles of the N x N matrices are made, used and discarded, and made again in the backward pass; memory N.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from icsd.losses.base import NOISE
from icsd.losses.gram import compute_dtype, inverse_norms, no_autocast

Regime = Literal["sample", "feature", "streamed"]

# N x N matrices of more bytes are streamed, not kept.
KEPT_BYTES = 1 << 28

_forced: Regime | None = None


@contextmanager
def force_regime(regime: Regime) -> Iterator[None]:
    """Choose one regime within the `with` block wherever it is offered. Tests and measurements use it."""
    global _forced
    before, _forced = _forced, regime
    try:
        yield
    finally:
        _forced = before


def choose_regime(offered: Collection[Regime], stages: Sequence[Tensor]) -> Regime:
    """Return the regime that costs least.

    Args:
        offered: The regimes that the backend has for the loss. `"sample"` is always among them.
        stages: Features `(*B, N, D_k)` of every student, then of the teacher.
    """
    if _forced in offered:
        return _forced
    *groups, samples, _ = stages[-1].shape
    dims = [stage.shape[-1] for stage in stages]
    if (
        "feature" in offered
        and samples > min(dims)  # feature space is never cheaper otherwise
        and feature_flops(samples, dims) < sample_flops(samples, dims)
    ):
        return "feature"
    matrices = len(stages) * math.prod(groups) * samples * (samples + 1)
    if 8 * matrices <= KEPT_BYTES:  # in any dtype
        return "sample"
    if "streamed" in offered and matrices * compute_dtype(*stages).itemsize > KEPT_BYTES:
        return "streamed"
    return "sample"


def cka_in_feature_space(stages: Sequence[Tensor]) -> bool:
    """Return whether `cka` is computed from D x D matrices: those of N x N would take too much memory."""
    if _forced is not None:
        return _forced == "feature"
    *groups, samples, _ = stages[-1].shape
    matrices = len(stages) * math.prod(groups) * samples**2
    return (
        samples > max(stage.shape[-1] for stage in stages) and matrices * compute_dtype(*stages).itemsize > KEPT_BYTES
    )


def sample_flops(samples: int, dims: Sequence[int]) -> int:
    """Return the flops of both passes: one triangle of each Gram matrix, and M X for each student."""
    *students, teacher = dims
    return samples**2 * (3 * sum(students) + teacher)


def feature_flops(samples: int, dims: Sequence[int]) -> int:
    """Return the flops of both passes: one triangle of X̂ᵀX̂ and ŶᵀŶ, X̂ᵀŶ, and their products with X̂ and Ŷ."""
    *students, teacher = dims
    return samples * (teacher**2 + sum(3 * dim**2 + 4 * dim * teacher for dim in students))


def feature_space_mse(students: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], eps: float) -> Tensor:
    """Return Σ_k w_k mean (S_k - T)² from D x D matrices, in plain PyTorch: it has derivatives of any order.

    Args:
        students: `(*B, N, D_k)`.
        teacher: `(*B, N, D)`.
        weights: One weight for each student.
        eps: The least norm of a sample.

    Returns:
        `(*B)` in compute dtype; it is computed in float64.
    """
    dtype = compute_dtype(*students, teacher)
    target, loss = normalized(teacher, eps), 0
    for weight, student in zip(weights, students, strict=True):
        x = normalized(student, eps)
        squares = [(a.mT @ b).square().sum((-2, -1)) for a, b in ((x, x), (x, target), (target, target))]
        loss = loss + weight * ((squares[0] - squares[1]) + (squares[2] - squares[1]))
    return (loss / max(1, teacher.shape[-2] ** 2)).to(dtype)


def feature_space_cka(students: Sequence[Tensor], teacher: Tensor, weights: Sequence[float]) -> Tensor:
    """Return Σ_k w_k (1 - |X_kᵀY|² / (|X_kᵀX_k| |YᵀY|)) of samples without their mean, in plain PyTorch.

    Args:
        students: `(*B, N, D_k)`.
        teacher: `(*B, N, D)`.
        weights: One weight for each student.

    Returns:
        `(*B)` in compute dtype; it is computed in float64, in which the difference to 1 does not cancel.
    """
    dtype, loss = compute_dtype(*students, teacher), 0
    with no_autocast(teacher):
        y, inverse_y = _centered_samples(teacher, dtype)
        for weight, student in zip(weights, students, strict=True):
            x, inverse_x = _centered_samples(student, dtype)
            alignment = (x.mT @ y).square().sum((-2, -1)) * inverse_x * inverse_y
            neither = (inverse_x == 0) & (inverse_y == 0)  # two constant batches are alike
            loss = loss + weight * (1 - alignment).masked_fill(neither, 0)
    return loss.to(dtype)


def _centered_samples(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return samples minus their mean in float64 and 1 / |XᵀX| of them, which is 0 for a constant batch: `(*B)`."""
    x = x.double()
    mean = x.mean(-2, keepdim=True)
    x = x - mean
    product = x.mT @ x
    total = (product.detach() + x.shape[-2] * (mean.mT @ mean).detach()).square().sum((-2, -1)).sqrt()
    norm = product.square().sum((-2, -1))
    vanishes = norm.detach().sqrt() <= NOISE * torch.finfo(dtype).eps * total  # False for NaN
    return x, norm.masked_fill(vanishes, 1).rsqrt().masked_fill(vanishes, 0)


def without_diagonal(loss: Tensor, stages: Sequence[Tensor], weights: Sequence[float], eps: float) -> Tensor:
    """Return the `mse` without the diagonals of S and T from the one with them, `(*B)` each."""
    *students, target = (self_similarities(stage, eps) for stage in stages)
    samples = target.shape[-1]
    loss = loss * samples**2
    for weight, own in zip(weights, students, strict=True):
        loss = loss - weight * (own - target).square().sum(-1)
    return loss / max(1, samples * (samples - 1))


def self_similarities(x: Tensor, eps: float) -> Tensor:
    """Return the diagonal of S, `(*B, N)` in compute dtype: exactly 1 unless eps replaces the norm."""
    square = x.to(compute_dtype(x)).square().sum(-1)
    is_clamped = square.sqrt() < eps
    scaled = x.to(square.dtype).masked_fill(~is_clamped.unsqueeze(-1), 0) / eps  # the square of eps may be no number
    return torch.where(is_clamped, scaled.square().sum(-1), 1)


def normalized(x: Tensor, eps: float) -> Tensor:
    """Return X̂ in float64."""
    with no_autocast(x):
        x = x.double()
        return x * inverse_norms(x.square().sum(-1), eps).unsqueeze(-1)
