"""The schedule `slices`: each rank has all samples of a slice of the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icsd.losses import distill_grams
from icsd.losses.gram import centered
from icsd.ops.distributed.call import Call
from icsd.ops.distributed.collectives import Shares, SliceInFlight, sum_over_ranks
from icsd.ops.registry import Backend


def distill(shares: Shares, call: Call) -> Tensor:
    """Return the loss of the samples of all ranks, `(*B)` and replicated."""
    matrices = grams(shares, call.backend, call.tensors, call.center)
    return distill_grams(matrices, call.weights, call.loss, call.eps)


def grams(shares: Shares, backend: Backend, stages: Sequence[Tensor], center: bool) -> list[Tensor]:
    """Return the Gram matrices of the samples of all ranks, `(*B, N, N)` each and replicated.

    The slice of the next stage is on its way while the backend reads that of the stage before.
    """
    partial = []
    for in_flight in [SliceInFlight(shares, stage) for stage in stages]:
        x = in_flight.wait()
        partial.append(backend.gram(centered(x) if center else x))
    dtypes = {gram.dtype for gram in partial}
    if len(dtypes) > 1:
        partial = [gram.double() for gram in partial]
    return list(sum_over_ranks(shares.ranks, torch.stack(partial)).unbind(0))
