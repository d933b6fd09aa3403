"""The schedule `moments`: `mse` from the D x D matrices of the samples of all ranks.

|S - T|² = |X̂ᵀX̂|² - 2|X̂ᵀŶ|² + |ŶᵀŶ|², and each of these matrices is a sum over samples. They are float64, because the
result is a small difference of large terms where S is near T.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.distributed.call import Call
from icsd.ops.distributed.collectives import Shares, centered_over_ranks, sum_over_ranks
from icsd.ops.regimes import normalized, self_similarities


def distill(shares: Shares, call: Call) -> Tensor:
    """Return the `mse` of the samples of all ranks, `(*B)` and replicated."""
    stages = call.tensors
    groups, dtype = stages[-1].shape[:-2], compute_dtype(*stages)
    if call.center:
        stages = [centered_over_ranks(shares, stage) for stage in stages]
    *students, target = (normalized(stage, call.eps) for stage in stages)
    moments = [target.mT @ target]
    for student in students:
        moments += [student.mT @ student, student.mT @ target]
    pieces = [moment.reshape(*groups, -1) for moment in moments]
    if not call.loss.include_diagonal:
        pieces.append(_diagonal_squares(stages, call.weights, call.eps).unsqueeze(-1))
    total = sum_over_ranks(shares.ranks, torch.cat(pieces, -1))
    target, *squares = (
        piece.square().sum(-1) for piece in total.split([piece.shape[-1] for piece in pieces], -1)[: len(moments)]
    )
    value = 0
    for weight, own, cross in zip(call.weights, squares[::2], squares[1::2], strict=True):
        value = value + weight * ((own - cross) + (target - cross))
    n = shares.total
    if not call.loss.include_diagonal:
        return ((value - total[..., -1]) / max(1, n * (n - 1))).to(dtype)
    return (value / max(1, n * n)).to(dtype)


def _diagonal_squares(stages: Sequence[Tensor], weights: Sequence[float], eps: float) -> Tensor:
    """Return what the diagonals of S and T add to the sum of squares, `(*B)`, of the samples of this rank."""
    *students, target = (self_similarities(stage, eps).double() for stage in stages)
    return sum(weight * (own - target).square().sum(-1) for weight, own in zip(weights, students, strict=True))
