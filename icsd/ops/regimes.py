"""The three ways to compute a distillation loss, and the choice among them by cost.

* `sample`: the N x N matrices are made and kept; cost N² D, memory N². A GAN's case: few samples, many features.
* `feature`: `mse` by way of the D x D matrices, |S - T|² = |X̂ᵀX̂|² - 2|X̂ᵀŶ|² + |ŶᵀŶ|²; cost N D², memory D².
* `streamed`: tiles of the N x N matrices are made, used and forgotten, in the backward pass once more; memory N.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from icsd.losses.gram import compute_dtype, inverse_norms, no_autocast

Regime = Literal["sample", "feature", "streamed"]

# Bytes of N x N matrices above which they are streamed rather than kept.
KEPT_BYTES = 1 << 28

_forced: Regime | None = None


@contextmanager
def force_regime(regime: Regime) -> Iterator[None]:
    """Takes one regime within the `with` block wherever it is among those offered: for tests and measurements."""
    global _forced
    before, _forced = _forced, regime
    try:
        yield
    finally:
        _forced = before


def choose_regime(
    offered: Collection[Regime], groups: int, samples: int, widths: Sequence[int], itemsize: int
) -> Regime:
    """The cheapest regime.

    Args:
        offered: Those that the backend has for the loss; `"sample"` is always among them.
        groups: B.
        samples: N.
        widths: D of every student, then of the teacher.
        itemsize: Bytes of an element of compute dtype.
    """
    if _forced in offered:
        return _forced
    if (
        "feature" in offered
        and samples > min(widths)  # or else it never is
        and feature_flops(samples, widths) < sample_flops(samples, widths)
    ):
        return "feature"
    if "streamed" in offered and len(widths) * groups * samples * (samples + 1) * itemsize > KEPT_BYTES:
        return "streamed"
    return "sample"


def sample_flops(samples: int, widths: Sequence[int]) -> int:
    """Flops of forward and backward: one triangle of every Gram matrix, and M X for every student."""
    *students, teacher = widths
    return samples**2 * (3 * sum(students) + teacher)


def feature_flops(samples: int, widths: Sequence[int]) -> int:
    """Flops of forward and backward: one triangle of X̂ᵀX̂ and ŶᵀŶ, X̂ᵀŶ, and their products with X̂ and Ŷ."""
    *students, teacher = widths
    return samples * (teacher**2 + sum(3 * width**2 + 4 * width * teacher for width in students))


def feature_space_mse(students: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], eps: float) -> Tensor:
    """Σ_k w_k mean (S_k - T)² from D x D matrices, in plain PyTorch: for derivatives of higher order.

    Args:
        students: `(*B, N, D_k)`.
        teacher: `(*B, N, D)`.
        weights: One for each student.
        eps: Least norm of a sample.

    Returns:
        `(*B)`, computed in float64.
    """
    dtype = compute_dtype(*students, teacher)
    target, loss = _normalize(teacher, eps), 0
    for weight, student in zip(weights, students, strict=True):
        x = _normalize(student, eps)
        squares = [(a.mT @ b).square().sum((-2, -1)) for a, b in ((x, x), (x, target), (target, target))]
        loss = loss + weight * ((squares[0] - squares[1]) + (squares[2] - squares[1]))
    return (loss / max(1, teacher.shape[-2] ** 2)).to(dtype)


def _normalize(x: Tensor, eps: float) -> Tensor:
    """X̂ in float64."""
    with no_autocast(x):
        x = x.double()
        return x * inverse_norms(x.square().sum(-1), eps).unsqueeze(-1)
