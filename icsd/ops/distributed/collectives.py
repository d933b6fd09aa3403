"""Collective operations with derivatives of any order.

A tensor is either distributed, if each rank has a piece of its own, or replicated, if each rank computes the same
tensor from the same numbers. The gradient of a distributed tensor is distributed. The gradient of a replicated tensor
is replicated, and is the whole gradient, as if one process had computed the tensor. So what happens between
`sum_over_ranks` and `leave` needs no communication in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.distributed.ranks import Ranks, all_gather


class Shares(NamedTuple):
    """The shares of the ranks in a batch.

    Attributes:
        ranks: The ranks.
        samples: The number of samples of each rank.
    """

    ranks: Ranks
    samples: Sequence[int]

    @property
    def total(self) -> int:
        """The number of samples of all ranks."""
        return sum(self.samples)

    @property
    def own(self) -> slice:
        """The samples of this rank among all."""
        start = sum(self.samples[: self.ranks.rank])
        return slice(start, start + self.samples[self.ranks.rank])


def sum_over_ranks(ranks: Ranks, x: Tensor) -> Tensor:
    """Return the sum of a distributed tensor over the ranks, replicated."""
    return _Sum.apply(ranks, x)


def leave(ranks: Ranks, x: Tensor) -> Tensor:
    """Return a replicated tensor as a result that each rank uses as it likes.

    Its gradient is the sum of the gradients of all ranks. So the backward passes of all ranks together differentiate
    the sum of what the ranks make of their results.
    """
    return _Leave.apply(ranks, x)


def gather_samples(shares: Shares, x: Tensor) -> Tensor:
    """Return the samples of all ranks, `(*B, N, D)` and replicated, of those of this rank, `(*B, n, D)`."""
    return _Gather.apply(shares, x)


def centered_over_ranks(shares: Shares, x: Tensor) -> Tensor:
    """Return the samples of this rank minus the mean of all, `(*B, n, D)` in compute dtype.

    The first sample of all is subtracted before the mean is taken, as in `icsd.losses.gram.centered`.
    """
    x = x.to(compute_dtype(x))
    first = x.new_zeros((*x.shape[:-2], 1, x.shape[-1]))
    if shares.own.start == 0 and x.shape[-2]:
        first = x[..., :1, :].detach()
    with torch.no_grad():
        first = sum_over_ranks(shares.ranks, first)
    x = x - first
    mean = sum_over_ranks(shares.ranks, x.sum(-2, keepdim=True)) / max(1, shares.total)
    return x - leave(shares.ranks, mean)


class SliceInFlight:
    """All samples of a slice of the features of one stage, on their way to this rank.

    The features are sent when the object is made, and have arrived after `wait`. In between, a rank can work.

    Args:
        shares: The shares of the ranks in the batch.
        x: The features of the samples of this rank, `(*B, n, D)`.
    """

    def __init__(self, shares: Shares, x: Tensor) -> None:
        self._exchange = _Exchange(shares, x.shape[:-2], slice_dims(x.shape[-1], shares.ranks.size))
        self._work: list[dist.Work] = []
        self._arriving = _ToSlices.apply(self._exchange, self._work, x)

    def wait(self) -> Tensor:
        """Return the slice, `(*B, N, D_rank)`, once."""
        for work in self._work:
            work.wait()
        self._work.clear()  # and with it what has been sent
        arrived, self._arriving = self._arriving, None
        return self._exchange.joined(arrived)


def slice_dims(dim: int, ranks: int) -> list[int]:
    """Return the dim of the slice of each rank. Where `dim` cannot be divided, the first ranks have one more."""
    return [dim // ranks + (rank < dim % ranks) for rank in range(ranks)]


class _Sum(torch.autograd.Function):
    """Distributed to replicated."""

    @staticmethod
    def forward(ctx, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ranks.group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _Leave.apply(ctx.ranks, grad)


class _Leave(torch.autograd.Function):
    """Replicated to distributed."""

    @staticmethod
    def forward(ctx, ranks: Ranks, x: Tensor) -> Tensor:
        ctx.ranks = ranks
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _Sum.apply(ctx.ranks, grad)


class _Gather(torch.autograd.Function):
    """Distributed to replicated: the samples of this rank to those of all ranks."""

    @staticmethod
    def forward(ctx, shares: Shares, x: Tensor) -> Tensor:
        ctx.shares = shares
        most = max(shares.samples)
        padded = x.new_zeros((*x.shape[:-2], most, x.shape[-1]))  # all ranks send the same number of elements
        padded[..., : x.shape[-2], :] = x
        everything = x.new_empty((shares.ranks.size, *padded.shape))
        all_gather(everything.view(-1), padded.view(-1), shares.ranks)
        return torch.cat([block[..., :n, :] for block, n in zip(everything, shares.samples, strict=True)], -2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _Own.apply(ctx.shares, grad)


class _Own(torch.autograd.Function):
    """Replicated to distributed: the samples of all ranks to those of this rank."""

    @staticmethod
    def forward(ctx, shares: Shares, x: Tensor) -> Tensor:
        ctx.shares = shares
        return x[..., shares.own, :].clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _Gather.apply(ctx.shares, grad)


class _Exchange(NamedTuple):
    """An all-to-all between samples of all features and all samples of a slice of the features.

    Attributes:
        shares: The shares of the ranks in the batch.
        groups: The dimensions of groups.
        dims: The dim of the slice of each rank.
    """

    shares: Shares
    groups: Sequence[int]
    dims: Sequence[int]

    @property
    def own_dim(self) -> int:
        """The dim of the slice of this rank."""
        return self.dims[self.shares.ranks.rank]

    @property
    def own_samples(self) -> int:
        """The number of samples of this rank."""
        return self.shares.samples[self.shares.ranks.rank]

    @property
    def home_sizes(self) -> list[int]:
        """The elements of this rank's samples in the slice of each rank."""
        return [math.prod(self.groups) * self.own_samples * dim for dim in self.dims]

    @property
    def slice_sizes(self) -> list[int]:
        """The elements of each rank's samples in the slice of this rank."""
        return [math.prod(self.groups) * samples * self.own_dim for samples in self.shares.samples]

    def joined(self, flat: Tensor) -> Tensor:
        """Return the slice `(*B, N, D_rank)` of the elements that each rank sent."""
        if not self.groups:
            return flat.view(self.shares.total, self.own_dim)
        blocks = flat.split(self.slice_sizes)
        shapes = [(*self.groups, samples, self.own_dim) for samples in self.shares.samples]
        return torch.cat([block.view(shape) for block, shape in zip(blocks, shapes, strict=True)], -2)

    def run(self, outgoing: Tensor, home: bool, work: list[dist.Work] | None = None) -> Tensor:
        """Exchange elements. With `work`, return before they have arrived, and add what to wait for."""
        received, sent = self.slice_sizes, self.home_sizes
        if home:
            received, sent = sent, received
        ranks, arriving = self.shares.ranks, outgoing.new_empty(sum(received))
        try:
            pending = dist.all_to_all_single(
                arriving, outgoing, received, sent, group=ranks.group, async_op=work is not None
            )
        except (RuntimeError, NotImplementedError) as error:
            if "support" not in str(error):
                raise
            raise RuntimeError(
                f"process_group: backend {dist.get_backend(ranks.group)!r} of ranks 0 to {ranks.size - 1} has no "
                "all-to-all: use gloo or nccl, or gather the features within "
                "icsd.ops.distributed.force_schedule('gather')"
            ) from error
        if work is not None:
            work.append(_Sending(pending, outgoing))
        return arriving


class _Sending(NamedTuple):
    """A pending operation, and what it sends, which must live until then."""

    work: dist.Work
    outgoing: Tensor

    def wait(self) -> None:
        self.work.wait()


class _ToSlices(torch.autograd.Function):
    """Distributed samples `(*B, n, D)` to the distributed elements of slices, `(E)`."""

    @staticmethod
    def forward(ctx, exchange: _Exchange, work: list[dist.Work] | None, x: Tensor) -> Tensor:
        ctx.exchange = exchange
        outgoing = x.new_empty(x.numel())
        pieces = zip(outgoing.split(exchange.home_sizes), x.split(exchange.dims, -1), strict=True)
        for place, piece in pieces:
            place.view(piece.shape).copy_(piece)
        return exchange.run(outgoing, False, work)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, _FromSlices.apply(ctx.exchange, grad)


class _FromSlices(torch.autograd.Function):
    """Distributed elements of slices, `(E)`, to the distributed samples `(*B, n, D)`."""

    @staticmethod
    def forward(ctx, exchange: _Exchange, flat: Tensor) -> Tensor:
        ctx.exchange = exchange
        pieces = exchange.run(flat.contiguous(), True).split(exchange.home_sizes)
        shapes = [(*exchange.groups, exchange.own_samples, dim) for dim in exchange.dims]
        return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, _ToSlices.apply(ctx.exchange, None, grad)
