"""The processes that train one model together, under torchrun or any launcher that sets its variables.

Training with W ranks is training with one: each rank has its part of every batch, and all have the same weights,
buffers, queues and random state after every step. Gradients are averaged here instead of by `DistributedDataParallel`,
because the gradients of single losses, which their shares follow from, do not pass its hooks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from icsd.errors import InputError
from icsd.ops.distributed.collectives import Shares, gather_samples, leave
from icsd.ops.distributed.ranks import Ranks, ranks_of, small_tensor_device

T = TypeVar("T")

BUCKET_BYTES = 1 << 25
"""Bytes of gradients that are averaged at once."""


class Team:
    """The ranks of a training run. Without a process group, it is this process alone.

    Attributes:
        rank: Number of this process.
        size: Number of processes.

    Args:
        process_group: Process group of `torch.distributed`.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.ranks = Ranks(None, 0, 1) if process_group is None else ranks_of(process_group)
        self.rank, self.size = self.ranks.rank, self.ranks.size

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The process group if there are several ranks, for `process_group=` of the losses."""
        return self.ranks.group if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """True for the rank that writes and prints."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Return the part of this rank in a batch of `count` samples, which the ranks can share evenly."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, which can be pickled."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.ranks.group)
        return values

    def first(self, action: Callable[[], T]) -> T:
        """Return the result of an action that the first rank takes, on all ranks.

        Raises:
            InputError: It failed, on all ranks.
        """
        result = error = None
        if self.leads:
            try:
                result = action()
            except InputError as raised:
                error = raised
        result, message = self.gather((result, error and str(error)))[0]
        if message is not None:
            raise error or InputError(message)
        return result

    def any(self, flag: bool) -> bool:
        """Return whether a flag is true on any rank."""
        if self.size == 1:
            return flag
        most = torch.tensor([flag], dtype=torch.int64, device=small_tensor_device(self.ranks))
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.ranks.group)
        return bool(most.item())

    def samples(self, x: Tensor) -> Tensor:
        """Return the samples of all ranks, `(N, E)` of the same number of them, `(n, E)`, on each rank.

        The gradients of the ranks are added up.
        """
        if self.size == 1:
            return x
        return leave(self.ranks, gather_samples(Shares(self.ranks, [len(x)] * self.size), x))

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the ranks."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for tensor in [*tensors, None]:
            if bucket and (tensor is None or tensor.dtype != bucket[0].dtype or _nbytes(bucket) > BUCKET_BYTES):
                flat = torch.cat([each.reshape(-1) for each in bucket])
                dist.all_reduce(flat, group=self.ranks.group)
                parts = (flat / self.size).split([each.numel() for each in bucket])
                for each, part in zip(bucket, parts, strict=True):
                    each.copy_(part.view(each.shape))
                bucket = []
            bucket.append(tensor)

    def lost_contact(self, error: BaseException) -> bool:
        """Return whether an error says that another rank ended or did not answer in time."""
        text = str(error).lower()
        return self.size > 1 and (
            isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
            or any(sign in text for sign in ("gloo", "connection closed by peer", "timeout", "timed out"))
        )

    def check_equal(self, name: str, value: str) -> None:
        """Raise the same error on every rank unless all have the same value.

        Raises:
            InputError: A rank has another value.
        """
        values = self.gather(value)
        other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
        if other is not None:
            raise InputError(
                f"{name} differs between ranks: rank 0 has {_difference(values[0], values[other])}, rank {other} has "
                f"{_difference(values[other], values[0])}: start all ranks with the same"
            )


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _difference(value: str, other: str) -> str:
    """Return the lines of a value that another one does not have."""
    lines = set(other.splitlines())
    return ", ".join(line.strip() for line in value.splitlines() if line not in lines) or "nothing else"


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Join the other processes of this launch for a `with` block; without a launcher, return this process alone.

    A program that has made the default process group itself keeps it.
    """
    if dist.is_initialized():
        yield Team(dist.group.WORLD)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # One store serves all restarts, and still holds the addresses of processes that died.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Team(dist.group.WORLD)
    finally:
        dist.destroy_process_group()
