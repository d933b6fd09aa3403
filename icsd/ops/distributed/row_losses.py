"""Losses that are means over the rows of S and T, from sums over the elements of each row.

The columns of a row are on all ranks. Each of these losses needs a few sums over them, and so does its gradient:
d value_i / d S_ij is that of an element's terms, weighted by the derivatives of the value with respect to the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.losses import BUILT_IN, CC, DIST, KL, MSE, PKT, SP, Loss, SmoothL1
from icsd.losses.base import NOISE

Terms = Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]


class RowLoss(NamedTuple):
    """A loss by rows.

    Attributes:
        terms: Maps S, T and the references of their rows, `(*B, n, m)`, `(*B, n, m)` and `(R, *B, n, 1)`, to the terms
            whose sums over a row the loss needs, `(*B, n, m)` each. References of columns, `(R, *B, 1, m)`, give the
            terms of the rows of the transposed matrices.
        value: Maps the sums `(*B, n)`, the references `(*B, n)` and the length of the rows to the values of the rows.
        count: The number of terms.
        references: Maps S and T to the greatest element or exponent of each row, `(R, *B, n, 1)`, for terms that are
            relative to it.
        rescaled: Maps differences of references, `(R, *B, n, 1)`, to the factors of all sums. Without it, the
            references of the first elements stay.
        raw: True if the matrices are the products of the samples instead of their cosines.
        wide: True if the terms are computed in float64, because their sums cancel in the value.
    """

    terms: Terms
    value: Callable[[Sequence[Tensor], Sequence[Tensor], int], Tensor]
    count: int
    references: Callable[[Tensor, Tensor], Tensor] | None = None
    rescaled: Callable[[Tensor], Sequence[Tensor]] | None = None
    raw: bool = False
    wide: bool = False


def row_loss(loss: Loss, eps: float, dtype: torch.dtype) -> RowLoss | None:
    """Return a loss by rows, or None if it is not a mean over rows that sums determine.

    Args:
        loss: The loss.
        eps: The least norm of a sample.
        dtype: The dtype in which similarities are computed.
    """
    if type(loss) not in BUILT_IN:
        return None
    match loss:
        case MSE() | SmoothL1():
            return RowLoss(lambda s, t, _: [loss.of_elements(s, t)], _first_sum, 1)
        case CC(mode="paper"):
            return RowLoss(
                lambda s, t, _: [(loss.series(s) - loss.series(t)).square()],
                _first_sum,
                1,
                raw=loss.kernel == "bilinear",
            )
        case KL():
            return _kl(loss)
        case PKT(mode="paper"):
            return RowLoss(_pkt_terms, _pkt_value, 3)
        case SP():
            return RowLoss(lambda s, t, _: [s * s, t * t, s * t], _sp_value(eps), 3, raw=True, wide=True)
        case DIST():
            return RowLoss(_dist_terms, _dist_value(dtype), 5, references=_greatest, wide=True)
    return None


def _first_sum(sums: Sequence[Tensor], _, columns: int) -> Tensor:
    return sums[0]


def _kl(loss: KL) -> RowLoss:
    """Return the divergence of softmax rows, from sums of exponentials relative to the greatest one."""
    tau_s, tau_t = loss.student_temperature, loss.teacher_temperature

    def terms(s: Tensor, t: Tensor, references: Tensor) -> Sequence[Tensor]:
        s, t = s / tau_s, t / tau_t
        q = (t - references[1]).exp()
        return [(s - references[0]).exp(), q, q * (t - s)]

    def value(sums: Sequence[Tensor], references: Sequence[Tensor], columns: int) -> Tensor:
        p, q, weighted = sums
        return weighted / q - (references[1] + q.log()) + (references[0] + p.log())

    def references(s: Tensor, t: Tensor) -> Tensor:
        return torch.stack([s.amax(-1, keepdim=True) / tau_s, t.amax(-1, keepdim=True) / tau_t])

    def rescaled(difference: Tensor) -> Sequence[Tensor]:
        p, q = difference.exp()
        return [p, q, q]

    return RowLoss(terms, value, 3, references, rescaled)


def _pkt_terms(s: Tensor, t: Tensor, _) -> Sequence[Tensor]:
    p, q = ((cosine + 1).clamp(min=1e-7) for cosine in (s, t))
    return [p, q, q * (q.log() - p.log())]


def _pkt_value(sums: Sequence[Tensor], _, columns: int) -> Tensor:
    p, q, weighted = sums
    return weighted / q - q.log() + p.log()


def _sp_value(eps: float) -> Callable[[Sequence[Tensor], Tensor, int], Tensor]:
    def value(sums: Sequence[Tensor], _, columns: int) -> Tensor:
        """Return |k/|k| - l/|l||² of rows k and l: 1 if one of them vanishes, 0 if both do."""
        kk, ll, kl = sums
        return _distance(kk, ll, kl, kk <= eps**4, ll <= eps**4, 1)

    return value


def _greatest(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([s.amax(-1, keepdim=True), t.amax(-1, keepdim=True)])


def _dist_terms(s: Tensor, t: Tensor, references: Tensor) -> Sequence[Tensor]:
    """Return the terms relative to an element of each row, so that their variances do not cancel."""
    s, t = s - references[0], t - references[1]
    return [s, t, s * s, t * t, s * t]


def _dist_value(dtype: torch.dtype) -> Callable[[Sequence[Tensor], Sequence[Tensor], int], Tensor]:
    noise = (NOISE * torch.finfo(dtype).eps) ** 2

    def value(sums: Sequence[Tensor], references: Sequence[Tensor], columns: int) -> Tensor:
        """Return 1 - ρ of rows s and t: 1 if one of them is constant, 0 if both are."""
        s, t, ss, tt, st = sums
        variances = ss - s * s / columns, tt - t * t / columns
        constant = [
            variance.detach() <= noise * (variance + (total / columns + reference).square() * columns).detach()
            for variance, total, reference in zip(variances, (s, t), references, strict=True)
        ]
        return _distance(*variances, st - s * t / columns, *constant, 2) / 2

    return value


def _distance(aa: Tensor, bb: Tensor, ab: Tensor, no_a: Tensor, no_b: Tensor, if_one_vanishes: float) -> Tensor:
    """Return |a/|a| - b/|b||² from the products of a and b, and a constant where one of them vanishes."""
    vanishes = no_a | no_b
    scale = (aa.masked_fill(vanishes, 1) * bb.masked_fill(vanishes, 1)).rsqrt()
    distance = (2 - 2 * ab * scale).clamp(min=0)
    return torch.where(vanishes, if_one_vanishes * (no_a != no_b), distance)
