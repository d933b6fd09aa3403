"""The schedule `gather`: each rank receives all samples and computes the same loss as the others."""

from __future__ import annotations

from torch import Tensor

from icsd.ops.distributed.call import Call
from icsd.ops.distributed.collectives import Shares, gather_samples


def distill(shares: Shares, call: Call) -> Tensor:
    """Return the loss of the samples of all ranks, `(*B)` and replicated."""
    stages = [gather_samples(shares, stage) for stage in call.tensors]
    return call.backend.distill(stages, call.weights, call.loss, call.eps, call.center)
