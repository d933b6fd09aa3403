"""The processes that work together, under torchrun or any launcher that sets its variables.

Training with W ranks is training with one: each rank has its part of every batch, and all have the same weights,
buffers, queues and random state after every step. Gradients are averaged here instead of by `DistributedDataParallel`,
because the gradients of single losses, which their shares follow from, do not pass its hooks.

Evaluation, folders of images and ablations are spread in whole batches or runs, which ranks work through alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
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

ANSWER_SECONDS = 5.0
"""Seconds that a rank has to tell the others that it lost contact, too."""

LOCK_SECONDS = 0.05
"""Seconds that a rank leaves the interpreter's lock to the threads of gloo before it ends."""

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
"""Variables that make a process a rank, beside those that begin with `LAUNCH_PREFIXES`."""

LAUNCH_PREFIXES = ("TORCHELASTIC_", "MASTER_", "ROLE_")


class Team:
    """The ranks of a command. Without a process group, it is this process alone.

    Attributes:
        rank: Number of this process.
        size: Number of processes.

    Args:
        process_group: Process group of `torch.distributed`.
        store: Store that all ranks share. It deals out numbers to the ranks that ask for them, and tells which ranks
            still answer. Without a store, each rank takes every W-th number.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, store: dist.Store | None = None) -> None:
        self.ranks = Ranks(None, 0, 1) if process_group is None else ranks_of(process_group)
        self.rank, self.size = self.ranks.rank, self.ranks.size
        self.store = store
        self._numbers = itertools.count(self.rank, self.size)

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

    def collect(self, items: list[T]) -> list[T] | None:
        """Return the items of all ranks on the first rank, None on the others.

        Args:
            items: Every W-th item, which can be pickled; rank r has items r, r + W, r + 2 W, ...
        """
        if self.size == 1:
            return items
        everyone = [[]] * self.size if self.leads else None
        dist.gather_object(items, everyone, dist.get_global_rank(self.ranks.group, 0), self.ranks.group)
        if everyone is None:
            return None
        count = sum(map(len, everyone))
        return [everyone[place % self.size][place // self.size] for place in range(count)]

    def take(self) -> int:
        """Return the least number that no rank has taken yet. Threads may ask at the same time."""
        return next(self._numbers) if self.store is None else self.store.add("numbers taken", 1) - 1

    def first(self, action: Callable[[], T]) -> T:
        """Return the result of an action that the first rank takes, on all ranks.

        Raises:
            InputError: It failed, on all ranks.
            OSError: It failed, on the first rank; an InputError on the others.
        """
        result = self.each(lambda: action() if self.leads else None)
        return self.gather(result if self.leads else None)[0]

    def each(self, action: Callable[[], T]) -> T:
        """Return the result of an action that every rank takes, in which it does not wait for others.

        Raises:
            InputError: It failed on a rank; all ranks raise the error of the first of these.
            OSError: It failed on this rank, and on none before it.
        """
        result = error = None
        try:
            result = action()
        except (InputError, OSError) as raised:
            error = raised
        messages = self.gather(error and str(error))
        failed = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if failed is not None:
            raise error if failed == self.rank else InputError(messages[failed])
        return result

    def led(self, action: Callable[[], T]) -> T:
        """Return the result of an action that every rank takes, the first one before the others, which find its files.

        Raises:
            InputError: See `each`.
            OSError: See `each`.
        """
        result = self.each(lambda: action() if self.leads else None)
        others = self.each(lambda: None if self.leads else action())
        return result if self.leads else others

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

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over the ranks. A bucket of them travels while the next one is packed."""
        self.start_average(tensors)()

    @torch.no_grad()
    def start_average(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Send tensors on their way, and return a function that waits and replaces them by their means over the ranks.

        All ranks call it at the same place between their other collective operations.
        """
        on_the_way = []
        for bucket in _buckets(tensors) if self.size > 1 else ():
            flat = torch.cat([each.reshape(-1) for each in bucket])
            on_the_way.append((bucket, flat, dist.all_reduce(flat, group=self.ranks.group, async_op=True)))

        @torch.no_grad()
        def arrive() -> None:
            while on_the_way:
                bucket, flat, work = on_the_way.pop(0)
                work.wait()
                parts = flat.div_(self.size).split([each.numel() for each in bucket])
                for each, part in zip(bucket, parts, strict=True):
                    each.copy_(part.view(each.shape))

        return arrive

    def lost_contact(self, error: BaseException) -> bool:
        """Return whether an error says that another rank ended or did not answer in time."""
        text = str(error).lower()
        return self.size > 1 and (
            isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
            or any(sign in text for sign in ("gloo", "connection closed by peer", "timeout", "timed out"))
        )

    def missing(self) -> str:
        """Leave the process group after contact was lost, and describe the ranks that do not do the same.

        Ranks that wait for this one notice that it left. A rank that died or stalls does not, which tells it from them.
        """
        waiting = set(range(self.size))
        try:
            self.store.set(f"left {self.rank}", "")
            dist.destroy_process_group(self.ranks.group)
            until = time.monotonic() + ANSWER_SECONDS
            while waiting and time.monotonic() < until:
                waiting -= {rank for rank in waiting if self.store.check([f"left {rank}"])}
                time.sleep(0.02)
        except (AttributeError, RuntimeError):  # there is no store, or the process that held it is gone
            return "another rank, which ended or stalls"
        names = ", ".join(map(str, sorted(waiting)))
        return f"rank{'s' * (len(waiting) > 1)} {names}, which ended or stalls" if waiting else "the other ranks"

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


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield tensors of one dtype that travel together, at least `BUCKET_BYTES` of them as long as there are more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(each.nbytes for each in bucket) > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _difference(value: str, other: str) -> str:
    """Return the lines of a value that another one does not have."""
    lines = set(other.splitlines())
    return ", ".join(line.strip() for line in value.splitlines() if line not in lines) or "nothing else"


@contextlib.contextmanager
def joined(timeout: timedelta | None = None) -> Iterator[Team]:
    """Join the other processes of this launch for a `with` block; without a launcher, return this process alone.

    A program that has made the default process group itself keeps it. Only the first rank prints to the standard
    output.

    Args:
        timeout: The longest time that a rank waits for another one; by default `ICSD_TIMEOUT` in seconds, or else that
            of `torch.distributed`.

    Raises:
        InputError: Another rank ended or stalled, or `ICSD_TIMEOUT` is no number of seconds.
    """
    with _group(timeout or _given_timeout()) as team, contextlib.ExitStack() as stack:
        if not team.leads:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield team


@contextlib.contextmanager
def _group(timeout: timedelta | None) -> Iterator[Team]:
    """Make the default process group if there is none."""
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
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    team = Team(dist.group.WORLD, dist.PrefixStore("team", store))
    try:
        yield team
    except (RuntimeError, ConnectionError) as error:
        if not team.lost_contact(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"rank {team.rank} of {team.size} lost contact with {team.missing()} ({reason}): start all ranks again"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # A thread of gloo may be the last to drop a tensor, for which it needs the interpreter's lock. It would abort a
        # process that ends before (https://github.com/pytorch/pytorch/issues/190489).
        time.sleep(LOCK_SECONDS)


def _given_timeout() -> timedelta | None:
    """Return the timeout that the environment gives."""
    given = os.environ.get("ICSD_TIMEOUT")
    try:
        timeout = None if given is None else timedelta(seconds=float(given))
    except (ValueError, OverflowError):
        timeout = timedelta()
    if timeout is not None and timeout <= timedelta():
        raise InputError(f"ICSD_TIMEOUT is {given}: set the seconds that a rank waits for another one, or unset it")
    return timeout


def environment_alone() -> dict[str, str]:
    """Return the environment for a program that is no rank of this launch, and sees only the GPU of this rank."""
    environment = {
        name: value for name, value in os.environ.items() if name not in LAUNCH and not name.startswith(LAUNCH_PREFIXES)
    }
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
        environment["CUDA_VISIBLE_DEVICES"] = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]
    return environment
