"""The schedule `gather`: each rank receives all samples and computes the same loss as the others."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses import Loss
from icsd.ops.distributed.collectives import Shares, gather_samples
from icsd.ops.registry import Backend


def distill(
    shares: Shares,
    backend: Backend,
    stages: Sequence[Tensor],
    weights: Sequence[float],
    loss: Loss,
    eps: float,
    center: bool,
) -> Tensor:
    """Return the loss of the samples of all ranks, `(*B)` and replicated."""
    return backend.distill([gather_samples(shares, stage) for stage in stages], weights, loss, eps, center)
